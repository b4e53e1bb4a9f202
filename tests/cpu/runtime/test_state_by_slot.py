"""State that has a place for each slot, by an op made up for it: the next token is the sum of all before it."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.compiler import build as building
from penstock.compiler.options import BuildOptions
from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.engine.memory import request_bytes
from penstock.errors import OptionError, UnsupportedError
from penstock.ir import Graph, Type, emit, leaf, tensor
from penstock.ir import op as ops
from penstock.models.decoder import build_forward
from penstock.runtime.executor import Executor
from penstock.runtime.intake import Submission
from penstock.runtime.open import RunLimits
from penstock.runtime.requests import RequestOutput, SamplingParams
from penstock.runtime.step import CpuBackend
from tests.cpu.models.twins import save_twin

NEW = 30
PROMPTS = [tuple(range(1, 1 + n)) for n in (70, 3, 45, 70, 64, 1)]  # some begin alike, some are longer than a step


def tally(
    state: Any, tokens: Any, rows: Any, query_len: Any, context_len: Any, slot_of_row: Any, logits: Any, logit_rows: Any
) -> Any:
    """state: f32[N,1], of each slot the sum of its tokens. Gives [L,V] with one choice: the sum up to each row's
    token, modulo V. A row that begins a text begins at 0; padding has slot -1."""
    out = torch.full_like(logits, -100.0)
    sums = torch.zeros(len(tokens))
    for row, (slot, count, length) in enumerate(
        zip(slot_of_row.tolist(), query_len.tolist(), context_len.tolist(), strict=True)
    ):
        if slot < 0 or not count:
            continue
        own = (rows == row).nonzero()[:, 0]
        sums[own] = tokens[own].float().cumsum(0) + (0.0 if count == length else state[slot, 0])
        state[slot, 0] = sums[own[-1]] % logits.shape[1]
    out[torch.arange(len(out)), (sums[logit_rows.long()] % logits.shape[1]).long()] = 100.0
    return state, out


def _types(state: Type, *rest: Type) -> tuple[Type, Type]:
    return state, rest[5]


def _example(types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], *_: Any) -> list[Any]:
    return [torch.zeros(t.concrete(sizes), dtype=getattr(torch, t.format.torch_dtype)) for t in types]


def _with_tally(*args: Any) -> Graph:
    """The model's graph, and the op behind its logits."""
    graph = build_forward(*args)
    given = {node.name: node[0] for node in graph.leaves("input")}
    state = leaf("state", "tally", tensor("f32", "N", 1), group="slots1")
    inputs = [given[name] for name in ("tokens", "rows", "query_len", "context_len")]
    inputs += [leaf("input", "slot_of_row", tensor("i32", "S")), graph.outputs[0], given["logit_rows"]]
    node = emit("tally", state, *inputs)
    return Graph((node[1], *graph.outputs[1:], node[0]), (*graph.names, "tally"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Path]]:
    folder = tmp_path_factory.mktemp("by_slot")
    save_twin("llama", folder / "hf", {"max_position_embeddings": 128})
    limits = {"max_batch_size": 3, "max_num_tokens": 24, "max_seq_len": 128, "block_size": 16}
    options = BuildOptions(device="cpu", dtype="float32", cache_dir=folder / "cache", **limits)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_OPS", dict(ops._OPS))
        ops.get("add")
        ops.op(_types, writes={0: 0}, example=_example)(tally)
        patch.setattr(building, "build_forward", _with_tally)
        directory = building.build(folder / "hf", options, folder / "engine")
        yield store.load(directory), directory


def _expected(prompt: tuple[int, ...], vocabulary: int) -> tuple[int, ...]:
    text = list(prompt)
    for _ in range(NEW):
        text.append(sum(text) % vocabulary)
    return tuple(text[len(prompt) :])


def _executor(built: tuple[Engine, Path], blocks: int = 40, in_flight: int = 1) -> Executor:
    backend = CpuBackend(*built)
    backend.num_blocks, backend.steps_in_flight = (blocks,), in_flight
    backend.states["tally"].fill_(55.0)  # of somebody before
    return Executor(built[0], backend, None)


def _run(executor: Executor, **params: Any) -> list[tuple[int, ...]]:
    done = queue.SimpleQueue[RequestOutput]()
    given = SamplingParams(**{"temperature": 0, "max_tokens": NEW, "ignore_eos": True, **params})
    for index, prompt in enumerate(PROMPTS):
        executor.submit(Submission(str(index), prompt, given, done.put))  # type: ignore[arg-type]
    while executor.busy:
        executor.step()
    outputs = sorted((done.get() for _ in PROMPTS), key=lambda output: int(output.request_id))
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(("blocks", "in_flight"), [(40, 1), (40, 2), (9, 1), (9, 2)])
def test_each_slot_keeps_its_own_through_chunks_and_preemption(
    built: tuple[Engine, Path], blocks: int, in_flight: int
) -> None:
    executor = _executor(built, blocks, in_flight)
    assert _run(executor) == [_expected(prompt, built[0].vocab_size) for prompt in PROMPTS]
    counters, stats = executor.scheduler.counters, executor.snapshot()
    assert (counters.preemptions > 0) == (blocks == 9) and counters.reused_tokens == 0 and not stats["prefix_caching"]


def test_what_it_is_and_what_it_takes(built: tuple[Engine, Path]) -> None:
    engine = built[0]
    assert [group.name for group in engine.groups] == ["paged0"] and [g.name for g in engine.by_slot] == ["slots1"]
    assert (engine.profile.tables, engine.profile.slot_rows) == (1, 1)
    assert CpuBackend(*built).states["tally"].shape == (3, 1)
    assert request_bytes(engine, engine.profile) == 8 * engine.block_bytes + 4


def test_what_it_cannot_do_is_refused(built: tuple[Engine, Path]) -> None:
    with pytest.raises(UnsupportedError, match="state that cannot be forked"):
        _run(_executor(built), use_beam_search=True, beam_width=2, n=2)
    with pytest.raises(OptionError, match=r"host_cache_size=1000000 .* \(slots1\); leave it out"):
        RunLimits(host_cache_size=1_000_000).host_blocks(built[0])
