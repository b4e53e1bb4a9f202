"""Output tokens a second of many requests of different lengths: batched in flight, and in batches that wait."""

from __future__ import annotations

import time
from collections.abc import Sequence

from penstock.llm import LLM
from penstock.runtime.requests import SamplingParams

Request = tuple[Sequence[int], int]  # a prompt, and the tokens to generate


def mixed(llm: LLM, requests: Sequence[Request]) -> float:
    """All requests at once: output tokens / time."""
    return sum(new for _, new in requests) / _seconds(llm, requests)


def static(llm: LLM, requests: Sequence[Request], batch: int) -> float:
    """The same requests in batches, each of which waits for its longest before the next begins.

    Rows that have ended are not computed any more: kinder than a runtime that pads them to the end.
    """
    batches = [requests[i : i + batch] for i in range(0, len(requests), batch)]
    return sum(new for _, new in requests) / sum(_seconds(llm, part) for part in batches)


def _seconds(llm: LLM, requests: Sequence[Request]) -> float:
    prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
    params = [SamplingParams(max_tokens=new, ignore_eos=True, temperature=0.0, detokenize=False) for _, new in requests]
    start = time.perf_counter()
    llm.generate(prompts, params)
    return time.perf_counter() - start
