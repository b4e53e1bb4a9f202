"""What generate, chat, run and demo share: opening a model with progress shown, and streaming one completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from penstock.cli.console import Progress, counted, result, say

if TYPE_CHECKING:
    from penstock.llm import LLM
    from penstock.runtime.requests import RequestOutput, SamplingParams


def open_llm(model: str | None, progress: Progress, **arguments: Any) -> LLM:
    """The model, built if needed; stages are shown until it is ready."""
    from penstock.llm import LLM

    with progress:
        return LLM(model, progress=progress, **arguments)


def defaults_of(llm: LLM, params: SamplingParams) -> tuple[str, ...]:
    """What is taken for each sampling parameter that was left out, and from where; a line each."""
    from penstock.runtime.sampling.resolve import Resolver

    return Resolver(llm.engine.tokens.get("generation", {})).resolve(params)[1]


def stream(
    llm: LLM, prompt: str | Mapping[str, Any], params: SamplingParams, timeout: float | None = None
) -> RequestOutput:
    """Write the text to stdout as it comes; returns the whole output. An interrupt cancels the request."""
    pieces = llm.stream(prompt, params, timeout=timeout)
    try:
        for piece in pieces:
            result(piece, end="")
    except BaseException:
        pieces.close()
        raise
    result("")
    assert pieces.output is not None
    return pieces.output


def rates(output: RequestOutput) -> tuple[float, float]:
    """(seconds to the first token, tokens a second after it, of all texts; 0 where there is but one)."""
    metrics, count = output.metrics, sum(len(text.token_ids) for text in output.outputs)
    first = metrics.time_to_first_token or 0.0
    rest = (metrics.latency or 0.0) - first
    return first, (count - 1) / rest if rest > 0 and count > 1 else 0.0


def say_rate(output: RequestOutput) -> None:
    """One line about what was made, and how fast."""
    texts, prompt = output.outputs, counted(len(output.prompt_token_ids), "prompt token")
    tokens = sum(len(text.token_ids) for text in texts)
    reasons = ", ".join(dict.fromkeys(str(text.finish_reason) for text in texts)) or "timeout"  # of a search: no text
    several = "" if len(texts) == 1 else f" in {counted(len(texts), 'text')}"
    say(f"[{prompt}, {tokens} generated{several} ({reasons}); {_pace(output, tokens)}]")


def _pace(output: RequestOutput, tokens: int) -> str:
    if not tokens or output.outputs[0].score is not None:  # the texts of a search come at once
        return f"ended after {(output.metrics.latency or 0.0) * 1e3:.0f} ms"
    first, rate = rates(output)
    return f"first after {first * 1e3:.0f} ms" + (f", then {rate:.1f} tok/s" if rate else "")
