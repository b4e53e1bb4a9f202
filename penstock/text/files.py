"""Which files of a model directory belong to its text side, and how they are read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from penstock.errors import TokenizerError

TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
# What tokenizers were written as before tokenizer.json, read where there is none; tiktoken's are *.tiktoken besides.
PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "ice_text.model")
VOCABULARY, MERGES = "vocab.json", "merges.txt"
ADDITIONAL_TEMPLATES = "additional_chat_templates"
# The largest tokenizer.json published so far is 40 MB.
MAX_FILE_BYTES = 256 << 20
MAX_ID = 2**31 - 1  # of a token; the device indexes with 32 bits
MAX_DEPTH = 100  # of lists and objects within each other; the published files have about five

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def text_files(directory: Path) -> tuple[Path, ...]:
    """The files to copy so that a directory stands alone; paths within `directory`, sorted."""
    found = [directory / name for name in (*TOKENIZER_FILES, *PIECES, VOCABULARY, MERGES)]
    found += [*directory.glob("*.tiktoken"), *(directory / ADDITIONAL_TEMPLATES).glob("*.jinja")]
    return tuple(sorted(path for path in found if path.is_file()))


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises TokenizerError when it is missing, too large or not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"cannot read {path}: {error}; download the file again") from error


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises TokenizerError when it is missing or too large."""
    try:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise TokenizerError(f"{path} has {size} bytes, at most {MAX_FILE_BYTES} are read; is it the right file?")
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error}; download the file again") from error


def parse_json(text: str | bytes) -> Any:
    """Any JSON of moderate depth: what can be read can then be copied and written too. Raises ValueError."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _inside(value: object) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or {} when there is no such file. Raises TokenizerError when it is anything else."""
    if not path.is_file():
        return {}
    try:
        value = parse_json(text := read_text(path))
        if "\\ud" in text.lower():  # perhaps half of a character
            json.dumps(value, ensure_ascii=False).encode()
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON: {error}; download the file again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__}, not an object; download the file again")
    return value


def token_text(value: object) -> str | None:
    """The text of a token as configuration files write it: a string, or an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def special_tokens(directory: Path) -> dict[str, str]:
    """bos_token, eos_token, ...: the texts of the special tokens; tokenizer_config.json wins over the older map."""
    merged = read_json(directory / "special_tokens_map.json")
    merged |= {k: v for k, v in read_json(directory / "tokenizer_config.json").items() if v is not None}
    texts = {name: token_text(merged.get(name)) for name in SPECIAL_NAMES}
    return {name: text for name, text in texts.items() if text is not None}
