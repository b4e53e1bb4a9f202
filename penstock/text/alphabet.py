"""GPT-2's alphabet: a printable Latin-1 byte stands for itself, the n-th other byte is written U+0100 + n."""

from __future__ import annotations

from functools import cache


@cache
def byte_of_character() -> dict[str, int]:
    return {character: byte for byte, character in character_of_byte().items()}


@cache
def character_of_byte() -> dict[int, str]:
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}
