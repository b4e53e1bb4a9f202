"""Tokenizers from before tokenizer.json: SentencePiece, tiktoken, vocab.json with merges.txt.

The files hold the tokens; how a text is cut and which tokens stand around it was code, by the tokenizer's class. What
is known of each class is data here. A class that is not known is refused: guessing would change the ids in silence.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import AddedToken, processors

from penstock.errors import TokenizerError
from penstock.text import sentencepiece
from penstock.text.border import border
from penstock.text.byte_level import (
    CL100K,
    LLAMA3,
    O200K,
    QWEN,
    ByteLevel,
    parse_merges,
    parse_tiktoken,
    parse_vocabulary,
)
from penstock.text.files import (
    MAX_ID,
    MERGES,
    PIECES,
    SPECIAL_NAMES,
    TOKENIZER,
    VOCABULARY,
    read_bytes,
    read_json,
    read_text,
    text_files,
    token_text,
)  # fmt: skip

REMEDY = (
    "write one where transformers is installed: AutoTokenizer.from_pretrained(DIR, use_fast=True).save_pretrained(DIR)"
)
WITHOUT = "in Python LLM(DIR, skip_tokenizer_init=True) takes prompts of token ids without one"


@dataclass(frozen=True)
class Convention:
    """What a class of tokenizers adds to its files.

    special: the tokens of roles that no file names. bos, eos: whether they are added when no file says.
    prefix, suffix: tokens around every text. appended: special tokens that follow the vocabulary.
    pattern: how a text is cut, for byte-level ones; None is GPT-2's own.
    """

    special: Mapping[str, Any] = field(default_factory=dict)
    bos: bool = False
    eos: bool = False
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    appended: tuple[str, ...] = ()
    pattern: str | None = None
    compose: bool = False


_SP = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_END = "<|endoftext|>"
_LLAMA = Convention(_SP, bos=True)
_GEMMA = Convention({"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}, bos=True)
_T5 = Convention({"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}, eos=True)
_GPT2 = Convention({"bos_token": _END, "eos_token": _END, "unk_token": _END})
_BART = Convention(
    {**_SP, "sep_token": "</s>", "cls_token": "<s>", "pad_token": "<pad>",
     "mask_token": {"content": "<mask>", "lstrip": True}},
    prefix=("<s>",), suffix=("</s>",),
)  # fmt: skip
_QWEN1 = Convention(
    appended=(_END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))), pattern=QWEN, compose=True
)
_QWEN2 = Convention({"eos_token": _END, "pad_token": _END}, pattern=QWEN, compose=True)
_GLM = Convention(
    prefix=("[gMASK]", "sop"), appended=("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"), special={"pad_token": "<unk>"}
)
_GLM1 = Convention(suffix=("[gMASK]", "<sop>"), special={"bos_token": "<sop>", "eos_token": "<eop>"})
_GLM4 = Convention(prefix=("[gMASK]", "<sop>"), pattern=LLAMA3)
_PLAIN = Convention()  # the files say everything

CONVENTIONS: Mapping[str, Convention] = {
    "LlamaTokenizer": _LLAMA, "CodeLlamaTokenizer": _LLAMA, "BaichuanTokenizer": _LLAMA, "GemmaTokenizer": _GEMMA,
    "T5Tokenizer": _T5, "MT5Tokenizer": _T5, "GPT2Tokenizer": _GPT2, "CodeGenTokenizer": _GPT2,
    "BartTokenizer": _BART, "RobertaTokenizer": _BART, "QWenTokenizer": _QWEN1, "Qwen2Tokenizer": _QWEN2,
    "ChatGLMTokenizer": _GLM, "ChatGLM4Tokenizer": _GLM4, "PreTrainedTokenizer": _PLAIN, "TokenizersBackend": _PLAIN,
}  # fmt: skip
# For directories whose files name no class: by the model_type of config.json.
_CLASSES: Mapping[str, str] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "phi3", "grok-1"), "LlamaTokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("t5", "mt5", "umt5"), "T5Tokenizer"),
    **dict.fromkeys(("gpt2", "gptj", "opt", "starcoder2"), "GPT2Tokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    "phi": "CodeGenTokenizer", "bart": "BartTokenizer", "qwen": "QWenTokenizer", "baichuan": "BaichuanTokenizer",
    "chatglm": "ChatGLMTokenizer",
}  # fmt: skip
# Files that name their own encoding, whatever the class.
_ENCODINGS = {"qwen": QWEN, "cl100k_base": CL100K, "o200k_base": O200K, "o200k_harmony": O200K}


class Vocabulary(Protocol):
    """Tokens and their ids as the files give them, and the tokenizer made of them and of added tokens."""

    @property
    def vocabulary(self) -> Mapping[str, int]: ...

    @property
    def special(self) -> tuple[str, ...]: ...

    def build(self, extra: Mapping[str, int]) -> tokenizers.Tokenizer: ...


def found_files(directory: Path) -> tuple[str, ...]:
    """The names of the files here that could be a tokenizer, the one that counts first."""
    ranks = sorted(path.name for path in directory.glob("*.tiktoken"))
    names = (*PIECES, *ranks, VOCABULARY, "vocab.txt", "tekken.json")
    return tuple(name for name in names if (directory / name).is_file())


def copy_text(source: Path, target: Path) -> None:
    """Copy the text files of a directory; where tokenizer.json can be made of others, it is written too.

    So an engine stands alone: the class of the old files may be known from config.json only, which it does not have.
    """
    for file in text_files(source):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    if not (source / TOKENIZER).is_file() and found_files(source):
        with contextlib.suppress(TokenizerError):  # whoever loads the copy is told the same
            (target / TOKENIZER).write_text(convert(source).to_str(), "utf-8")


def convert(directory: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a directory without tokenizer.json. Raises TokenizerError with the remedy where it cannot be."""
    files = found_files(directory)
    if not files and not any((directory / name).is_file() for name in ("config.json", "engine.json")):
        raise TokenizerError(
            f"{directory} has no tokenizer.json (no other tokenizer file either), and neither config.json nor "
            "engine.json: it holds no model; name the directory of one, or of an engine"
        )
    if not files or files[0] in ("vocab.txt", "tekken.json"):
        found = f"only {', '.join(files)}" if files else "no other tokenizer file either"
        raise TokenizerError(f"{directory} has no tokenizer.json ({found}); {REMEDY}; {WITHOUT}")
    config = read_json(directory / "tokenizer_config.json")
    convention = _convention(directory, config, files[0])
    source = _read(directory / files[0], convention, config)
    if convention is _GLM and isinstance(source, ByteLevel):
        convention = _GLM4
    added = _added(directory, config, convention, source)
    known = source.vocabulary
    backend = _built(source, {text: number for text, (number, _) in added.items() if text not in known}, directory)
    backend.add_tokens([token for _, token in sorted(added.values(), key=lambda pair: pair[0])])
    _surround(backend, config, convention, directory)
    return backend


def _built(source: Vocabulary, extra: Mapping[str, int], directory: Path) -> tokenizers.Tokenizer:
    with border(f"{directory}: its tokenizer files make no tokenizer", REMEDY):
        return source.build(extra)


def _convention(directory: Path, config: Mapping[str, Any], file: str) -> Convention:
    if file == "ice_text.model":
        return _GLM1
    name = config.get("tokenizer_class")
    if name is None:
        name = _CLASSES.get(str(read_json(directory / "config.json").get("model_type")))
    known = CONVENTIONS.get(str(name).removesuffix("Fast"))
    if known is None:
        raise TokenizerError(
            f"{directory} has no tokenizer.json, and the tokenizer class {name!r} of its {file} is not known "
            f"(known: {', '.join(CONVENTIONS)}); {REMEDY}"
        )
    return known


def _read(path: Path, convention: Convention, config: Mapping[str, Any]) -> Vocabulary:
    if path.name == VOCABULARY:
        vocabulary = parse_vocabulary(read_json(path), str(path))
        merges = path.with_name(MERGES)
        return ByteLevel(
            vocabulary, parse_merges(read_text(merges), vocabulary, str(merges)), convention.pattern,
            prefix_space=config.get("add_prefix_space") is True, compose=convention.compose,
        )  # fmt: skip
    data = read_bytes(path)
    if data[:1] != b"\n":  # the tag of a first piece; no line of base64 begins so
        return _ranks(path, data, convention)
    model = sentencepiece.parse(data, str(path))
    if convention is _GLM1:
        return replace(model, replaced=_glm1_spaces(), legacy=True)
    return replace(model, legacy=config.get("legacy", True) is not False)


def _ranks(path: Path, data: bytes, convention: Convention) -> ByteLevel:
    pattern = _ENCODINGS.get(path.stem, convention.pattern)
    if pattern is None and convention in (_LLAMA, _GLM, _PLAIN):
        pattern = LLAMA3  # Llama 3's own tokenizer.model, and GLM-4's
    if pattern is None:
        raise TokenizerError(f"{path} holds tiktoken's ranks, but not how a text is cut, and no known class; {REMEDY}")
    vocabulary, merges = parse_tiktoken(data, str(path))
    return ByteLevel(vocabulary, merges, pattern, whole=True, compose=convention.compose)


def _glm1_spaces() -> tuple[tuple[str, str], ...]:
    """ChatGLM's first version writes line breaks, tabs and runs of up to 80 blanks as pieces of their own."""
    return ("\n", "<n>"), ("\t", "<|tab|>"), *((" " * n, f"<|blank_{n}|>") for n in range(80, 1, -1))


class _Added:
    """Added tokens by their text, each with its id; a token of the vocabulary keeps the id that it has there."""

    def __init__(self, known: Mapping[str, int], directory: Path) -> None:
        self.tokens: dict[str, tuple[int, AddedToken]] = {}
        self._known = known
        self._texts = {number: text for text, number in known.items()}
        self._directory = directory

    def add(self, value: object, token_id: int | None = None, special: bool = True) -> None:
        """A token as files write it, a text or an object; without an id it has the vocabulary's, or the next one."""
        text = token_text(value)
        if text is None or not text:
            raise TokenizerError(f"{self._directory}: {value!r} is no token; it must be a text or an object with one")
        flags = value if isinstance(value, Mapping) else {}
        held = self._known[text] if text in self._known else self.tokens[text][0] if text in self.tokens else None
        number = token_id if token_id is not None else held if held is not None else max(self._texts, default=-1) + 1
        if self._texts.setdefault(number, text) != text or (held is not None and held != number):
            raise TokenizerError(
                f"{self._directory}: the added token {text!r} claims id {number}, which is {self._texts[number]!r} "
                f"(its own is {held}); the files are of two tokenizers"
            )
        # Found in the text as it stands, as those classes did: what was to be `normalized` is not told apart.
        token = AddedToken(
            text, single_word=bool(flags.get("single_word")), lstrip=bool(flags.get("lstrip")),
            rstrip=bool(flags.get("rstrip")), normalized=False, special=bool(flags.get("special", special)),
        )  # fmt: skip
        if text in self.tokens and not flags:
            token = self.tokens[text][1]
            token.special = token.special or special  # a role makes it so
        self.tokens[text] = (number, token)

    def has(self, text: str | None) -> bool:
        return text in self._known or text in self.tokens


def _added(
    directory: Path, config: Mapping[str, Any], convention: Convention, source: Vocabulary
) -> dict[str, tuple[int, AddedToken]]:
    added = _Added(source.vocabulary, directory)
    for text in (*source.special, *convention.appended, *_sentinels(config, convention)):
        added.add(text)
    older, newer = read_json(directory / "added_tokens.json"), _mapping(config, "added_tokens_decoder", directory)
    for text, number in older.items():
        added.add(text, _checked_id(number, directory), special=False)
    for number, value in newer.items():
        added.add(value, _checked_id(number, directory), special=False)
    stated = {**read_json(directory / "special_tokens_map.json"), **config}
    roles = _roles(stated, convention)
    more = _more(stated, directory)
    for value in (*roles.values(), *more):
        if value in stated.values() or value in more or added.has(token_text(value)):
            added.add(value)
    return added.tokens


def _mapping(config: Mapping[str, Any], key: str, directory: Path) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise TokenizerError(f"{directory}: {key} is a {type(value).__name__}, expected an object; correct it")
    return value


def _more(stated: Mapping[str, Any], directory: Path) -> list[Any]:
    """Special tokens without a role of their own."""
    key = next((k for k in ("additional_special_tokens", "extra_special_tokens") if stated.get(k)), "")
    value = stated[key] if key else []
    if not isinstance(value, list | dict):
        raise TokenizerError(f"{directory}: {key} is a {type(value).__name__}, expected a list of tokens; correct it")
    return list(value.values()) if isinstance(value, dict) else value


def _roles(stated: Mapping[str, Any], convention: Convention) -> dict[str, Any]:
    named = {name: stated.get(name) for name in SPECIAL_NAMES}
    return {**convention.special, **{name: value for name, value in named.items() if value is not None}}


def _sentinels(config: Mapping[str, Any], convention: Convention) -> tuple[str, ...]:
    """T5's <extra_id_0> is the last of the vocabulary, not the first behind it."""
    count = config.get("extra_ids", 100) if convention is _T5 else 0
    if type(count) is not int or not 0 <= count <= 10_000:
        raise TokenizerError(f"extra_ids={count!r} is no number from 0 to 10000; correct tokenizer_config.json")
    return tuple(f"<extra_id_{n}>" for n in reversed(range(count)))


def _checked_id(value: object, directory: Path) -> int:
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if type(number) is not int or not 0 <= number <= MAX_ID:
        raise TokenizerError(f"{directory}: {value!r} is no id of an added token; correct it")
    return number


def _surround(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], convention: Convention, directory: Path
) -> None:
    """Put the class's tokens around a text, by a post-processor."""
    roles = _roles({**read_json(directory / "special_tokens_map.json"), **config}, convention)
    asked = {name: config.get(f"add_{name}", default) for name, default in
             (("bos_token", convention.bos), ("eos_token", convention.eos))}  # fmt: skip
    bos, eos = ([token_text(roles.get(name)) or name] if on else [] for name, on in asked.items())
    before, after = [*convention.prefix, *bos], [*convention.suffix, *eos]
    ids = {text: backend.token_to_id(text) for text in (*before, *after)}
    if missing := [text for text, number in ids.items() if number is None]:
        raise TokenizerError(f"{directory}: {missing[0]!r} stands around every text, but is no token; correct its name")
    if ids:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=list(ids.items())
        )
