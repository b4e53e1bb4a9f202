"""Output held to a JSON schema, an expression, a list of choices or a grammar: what is asked, and compiling it.

xgrammar compiles and matches; it is imported inside functions alone, and a process without it says so.
"""

from __future__ import annotations

from penstock.grammar.guided import GuidedDecoding

__all__ = ["GuidedDecoding"]
