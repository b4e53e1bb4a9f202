"""What holds a request's text to a form."""

from __future__ import annotations

from typing import Any

from penstock.serve.serving import Serving
from penstock.unsupported import refuse


async def grammar_of(asked: dict[str, Any], serving: Serving) -> bytes | None:
    """The compiled grammar of GuidedDecoding's arguments; None where nothing is asked. Raises SamplingError."""
    if asked:
        refuse("guided_decoding")
    return None
