"""What each token stands for by itself: its text, and its bytes where it is part of a character."""

from __future__ import annotations

import re

from penstock.text.detokenize import is_byte_level, token_bytes
from penstock.text.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # as SentencePiece writes one


class Spelling:
    """Of one tokenizer's tokens. A token that is no whole characters is written as `bytes:\\xf0\\x9f`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self._byte_level = tokenizer, is_byte_level(tokenizer)
        self._known: dict[int, tuple[str, bytes]] = {}

    def of(self, token_id: int) -> tuple[str, bytes]:
        """Its text and bytes; both empty for an id without a token."""
        found = self._known.get(token_id)
        if found is None:
            spelt = self._bytes(token_id)
            found = self._known[token_id] = _written(spelt), spelt
        return found

    def _bytes(self, token_id: int) -> bytes:
        token = self.tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level and token_id not in self.tokenizer.special_ids:
            return token_bytes(token)
        if byte := _BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        # Behind itself, since a decoder may drop the space that begins a text.
        once, twice = (self.tokenizer.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(once) :].encode()


def _written(spelt: bytes) -> str:
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)
