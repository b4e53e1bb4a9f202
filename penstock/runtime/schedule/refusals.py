"""Whom the scheduler does not take: errors with the value, the limit and the remedy, before anything changes."""

from __future__ import annotations

from penstock.errors import PromptError, QueueFullError
from penstock.runtime.kv.manager import KvManager
from penstock.runtime.schedule.limits import Limits
from penstock.runtime.schedule.queue import WaitingQueue
from penstock.runtime.schedule.request import Request


def refuse_impossible(request: Request, kv: KvManager) -> None:
    """PromptError if it could never run."""
    length, limit = len(request.prompt), request.max_seq_len
    if not length:
        raise PromptError(f"the prompt of request {request.id!r} is empty; give at least 1 token")
    if length > limit - 1:
        raise PromptError(
            f"the prompt of request {request.id!r} has {length} tokens, the limit is {limit - 1} (max_seq_len="
            f"{limit} less 1 to generate); shorten it or raise max_seq_len"
        )
    if not kv.fits_pool(request.max_length):
        pool = kv.pool
        raise PromptError(
            f"request {request.id!r} may become {request.max_length} tokens long ({length} of prompt and "
            f"{request.output_limit} to generate), and the whole KV pool holds {pool.num_usable * pool.block_size} "
            f"({pool.num_usable} blocks of {pool.block_size}); lower max_tokens, shorten the prompt, or raise "
            f"gpu_memory_utilization or max_gpu_bytes"
        )


def refuse_full(request: Request, waiting: WaitingQueue, limits: Limits) -> None:
    """QueueFullError if too many wait, or tokens of too many."""
    if limits.max_num_queued_reqs is not None and len(waiting) >= limits.max_num_queued_reqs:
        raise QueueFullError(
            f"request {request.id!r} is refused: {len(waiting)} requests wait, the limit is max_num_queued_reqs="
            f"{limits.max_num_queued_reqs}; try again later"
        )
    tokens = waiting.num_tokens + request.prompt_length
    if limits.max_num_queued_tokens is not None and len(waiting) and tokens > limits.max_num_queued_tokens:
        raise QueueFullError(
            f"request {request.id!r} is refused: with its {request.prompt_length} tokens {tokens} would wait, the "
            f"limit is max_num_queued_tokens={limits.max_num_queued_tokens}; try again later"
        )
