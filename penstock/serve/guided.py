"""What holds a request's text to a form."""

from __future__ import annotations

from typing import Any

from penstock.grammar import GuidedDecoding
from penstock.runtime.sampling.params import SamplingParams
from penstock.serve.serving import Serving


async def grammar_of(asked: dict[str, Any], params: SamplingParams, serving: Serving) -> bytes | None:
    """The compiled grammar of GuidedDecoding's arguments; None where nothing is asked.

    Raises SamplingError for what cannot be compiled, or cannot be where the text may not end by itself.
    """
    if not asked:
        return None
    guided = GuidedDecoding(**asked)
    params.refuse_ends()
    return await (await serving.grammars()).compile(guided)
