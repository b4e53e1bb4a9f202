"""Whom the scheduler does not take: errors with the value, the limit and the remedy, before anything changes."""

from __future__ import annotations

from penstock.errors import LengthError, OptionError, PromptError, QueueFullError, UnsupportedError
from penstock.runtime.kv.manager import KvManager
from penstock.runtime.kv.tables import Rule, Tables
from penstock.runtime.schedule.limits import Limits
from penstock.runtime.schedule.queue import WaitingQueue
from penstock.runtime.schedule.request import Request


def refuse_impossible(request: Request, kv: KvManager, limits: Limits) -> None:
    """PromptError if it could never run, OptionError if its beams are more than there are slots, UnsupportedError if
    they cannot be."""
    width, group = len(request.members), request.group
    if width > limits.max_batch_size:
        raise OptionError(
            f"request {request.id!r} has beam_width={width}, the limit is max_batch_size={limits.max_batch_size}: each "
            f"beam takes a slot; lower the first or raise the second"
        )
    if group is not None and kv.by_slot:
        raise UnsupportedError(
            f"request {request.id!r} asks for a beam search, and the model keeps state that cannot be forked (a state-"
            f"space layer's); sample several texts with num_return_sequences instead"
        )
    length, limit = len(request.prompt), request.max_seq_len
    if not length:
        raise PromptError(f"the prompt of request {request.id!r} is empty; give at least 1 token")
    if length > limit - 1:
        raise LengthError(
            f"the prompt of request {request.id!r} has {length} tokens, the limit is {limit - 1} (max_seq_len="
            f"{limit} less 1 to generate); shorten it or raise max_seq_len"
        )
    if request.source:
        _refuse_source(request, kv, limits)
    for tables in kv.groups:
        if (tables.most(request.max_length) if group is None else group.num_blocks(tables)) > tables.pool.num_usable:
            raise LengthError(_too_long(request, tables))


def _refuse_source(request: Request, kv: KvManager, limits: Limits) -> None:
    length, most = len(request.source), min(limits.max_num_tokens, limits.max_seq_len)
    if length > most:
        raise LengthError(
            f"the input of request {request.id!r} has {length} tokens, the limit is {most}: an encoder reads it whole, "
            f"in one run of max_num_tokens={limits.max_num_tokens}, and max_seq_len={limits.max_seq_len} bounds it as "
            f"well; shorten it, or raise the lower limit"
        )
    for tables in kv.groups:
        if tables.rule is Rule.FIXED and tables.blocks_for(length) > tables.pool.num_usable:
            raise LengthError(
                f"the input of request {request.id!r} has {length} tokens, and the whole pool of what an encoder makes "
                f"holds {tables.pool.num_usable * tables.pool.block_size}; shorten it, or raise "
                f"gpu_memory_utilization or max_gpu_bytes"
            )


def _too_long(request: Request, tables: Tables) -> str:
    width, usable, size = len(request.members), tables.pool.num_usable, tables.pool.block_size
    beams = f", for each of {width} beams" if width > 1 else ""
    pool = f"the whole KV pool of layers with a window of {tables.window}" if tables.window else "the whole KV pool"
    return (
        f"request {request.id!r} may become {request.max_length} tokens long ({len(request.prompt)} of prompt and "
        f"{request.output_limit} to generate{beams}), and {pool} holds {usable * size} ({usable} blocks of {size}); "
        f"lower max_tokens, shorten the prompt, or raise gpu_memory_utilization or max_gpu_bytes"
    )


def refuse_full(request: Request, waiting: WaitingQueue, limits: Limits) -> None:
    """QueueFullError if too many wait, or tokens of too many."""
    if limits.max_num_queued_reqs is not None and len(waiting) >= limits.max_num_queued_reqs:
        raise QueueFullError(
            f"request {request.id!r} is refused: {len(waiting)} requests wait, the limit is max_num_queued_reqs="
            f"{limits.max_num_queued_reqs}; try again later, or send fewer at a time"
        )
    tokens = waiting.num_tokens + len(request.given)
    if limits.max_num_queued_tokens is not None and len(waiting) and tokens > limits.max_num_queued_tokens:
        raise QueueFullError(
            f"request {request.id!r} is refused: with its {len(request.given)} tokens {tokens} would wait, the "
            f"limit is max_num_queued_tokens={limits.max_num_queued_tokens}; try again later, or send fewer at a time"
        )
