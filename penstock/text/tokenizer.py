"""Text to token ids and back, by the rules of a model's tokenizer.json, or of the files that were before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from penstock.errors import PromptError, TokenizerError
from penstock.text import legacy
from penstock.text.border import border, check_tree
from penstock.text.files import TOKENIZER, read_json, read_text, special_tokens, text_files


class Tokenizer:
    """A tokenizer.json with the facts that live beside it: which ids begin and end a text.

    tokenizer.json's own post-processor decides which special tokens are added. Only where it adds no
    beginning-of-text token although tokenizer_config.json says `add_bos_token: true`, one is put in front.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Iterable[int] = (),
        add_bos: bool = False,
        directory: Path | None = None,
    ) -> None:
        # tokenizer.json may carry the settings of somebody's training run.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        # Asked for each token that is generated, so it is kept.
        self.id_to_token: Callable[[int], str | None] = lru_cache(maxsize=1 << 18)(backend.id_to_token)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self._directory = directory
        self._prepended = [bos_token_id] if add_bos and bos_token_id is not None else []

    @classmethod
    def from_dir(cls, path: str | Path, *, eos_token_ids: Iterable[int] = ()) -> Tokenizer:
        """Read a Hugging Face or engine directory.

        `eos_token_ids`: further ids that end a text, such as those of the model's spec.
        Raises TokenizerError when there is no tokenizer that can be read, or an id is outside its vocabulary.
        """
        directory = Path(path)
        backend = _load(directory)
        names = special_tokens(directory)
        config = read_json(directory / "tokenizer_config.json")
        return cls(
            backend,
            bos_token_id=_id_of(backend, names.get("bos_token")),
            eos_token_ids=[*_eos_ids(directory, backend, names.get("eos_token")), *eos_token_ids],
            add_bos=config.get("add_bos_token") is True,
            directory=directory,
        )

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's own vocabulary may be larger (padded)."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @property
    def eos_token_id(self) -> int | None:
        return self.eos_token_ids[0] if self.eos_token_ids else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. Raises PromptError when it is not valid Unicode (a lone surrogate)."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of several texts, each as `encode` would give them.

        Raises TokenizerError where the tokenizer has no token, not even an unknown one, for a part, or breaks.
        """
        for text in texts:
            _check_unicode(text)
        with border("the model's tokenizer cannot cut this text", f"send token ids, or {legacy.REMEDY}"):
            encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        first = self._prepended if add_special_tokens else []
        # Where the post-processor, or a rendered chat template, has put the token already, it is not put twice.
        return [list(e.ids) if e.ids[:1] == first else [*first, *e.ids] for e in encoded]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids, spaces left as they are; ids without a token (a padded vocabulary) have no text.

        Raises PromptError on a negative id.
        """
        if any(token_id < 0 for token_id in ids):
            raise PromptError(f"token id {min(ids)} is negative; ids go from 0 to {self.vocab_size - 1}")
        with border("the model's tokenizer cannot write these ids", f"download it again, or {legacy.REMEDY}"):
            return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def files(self) -> tuple[Path, ...]:
        """The files to copy into an engine directory; none for a tokenizer made in memory."""
        return text_files(self._directory) if self._directory is not None else ()


def _load(directory: Path) -> tokenizers.Tokenizer:
    path = directory / TOKENIZER
    if not path.is_file():
        return legacy.convert(directory)
    text = read_text(path)
    check_tree(text, str(path))
    with border(f"{path} is not a tokenizer", f"download it again, or {legacy.REMEDY}"):
        return tokenizers.Tokenizer.from_str(text)


def _id_of(backend: tokenizers.Tokenizer, token: str | None) -> int | None:
    return None if token is None else backend.token_to_id(token)


def _eos_ids(directory: Path, backend: tokenizers.Tokenizer, eos_token: str | None) -> list[int]:
    """The tokenizer's own end, then generation_config.json's (chat models name several), else config.json's."""
    own = _id_of(backend, eos_token)
    ids = [] if own is None else [own]
    ids += _declared_eos(directory / "generation_config.json")
    return ids or _declared_eos(directory / "config.json")


def _declared_eos(path: Path) -> list[int]:
    value: Any = read_json(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if bad := [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or i < 0]:
        raise TokenizerError(f"{path}: eos_token_id holds {bad[0]!r}; it must be an id or a list of ids, 0 or more")
    return ids


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the text holds a lone surrogate, U+{ord(text[error.start]):04X} at position {error.start}; "
            "send valid Unicode"
        ) from error
