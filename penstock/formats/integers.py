"""Integers: token ids, positions, block tables."""

from __future__ import annotations

from penstock.formats.base import Format, register

I32 = register(Format("i32", 32, "int32", "i32", "I32", False))
I64 = register(Format("i64", 64, "int64", "i64", "I64", False))
U8 = register(Format("u8", 8, "uint8", "u8", "U8", False))
