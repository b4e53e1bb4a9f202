"""Layers that look through a window give blocks back while they run, and the model says what it would say: where all
layers do, and where some see everything."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.engine.memory import kv_bytes, least_blocks, request_bytes, share_blocks
from penstock.errors import ResourceError
from penstock.runtime.executor import Executor
from penstock.runtime.intake import Submission
from penstock.runtime.requests import RequestOutput, SamplingParams
from penstock.runtime.step import CpuBackend, Ticket
from tests.cpu.engines.driven import generated, prompts_of
from tests.cpu.models.twins import save_twin

BLOCK, WINDOW, NEW = 16, 20, 120
CASES = {"mistral-window": {}, "qwen2-windows": {"num_hidden_layers": 4, "max_window_layers": 2}}
MOST = 3  # blocks that a decoding request holds: its window's may begin in the last token of a block, and one to write
PROMPTS = prompts_of((3, 47, 90))  # in one chunk, and in several
LIMITS = {"max_batch_size": 4, "max_num_tokens": 32, "max_seq_len": 256, "block_size": BLOCK}

Texts = list[tuple[int, ...]]


@pytest.fixture(scope="module", params=CASES)
def twin(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Any, Engine, Path]:
    folder, case = tmp_path_factory.mktemp("window"), request.param
    changes = {**CASES[case], "sliding_window": WINDOW, "max_position_embeddings": 256}
    model = save_twin(case, folder / "hf", changes)
    options = BuildOptions(device="cpu", dtype="float32", cache_dir=folder / "cache", **LIMITS)
    directory = build(folder / "hf", options, folder / "engine")
    return model, store.load(directory), directory


class Watched:
    """An executor that counts the blocks with a window that are held after every step. What is free when a step begins
    is NaN then: whoever reads it says nonsense."""

    def __init__(
        self, twin: tuple[Any, Engine, Path], blocks: int, in_flight: int = 1, whole: int = 65, hosts: int = 0,
        **options: Any,
    ) -> None:  # fmt: skip
        """`blocks` of the group with a window, `whole` of one without, `hosts` of each in the host's memory."""
        self.backend = CpuBackend(twin[1], twin[2], host_blocks=hosts)
        self.backend.num_blocks = tuple(blocks if group.window else whole for group in twin[1].groups)
        self.backend.steps_in_flight = in_flight
        self._launch, self.backend.launch = self.backend.launch, self.launch  # type: ignore[method-assign]
        self.executor = Executor(twin[1], self.backend, None, **options)
        self.kv = self.executor.kv
        (self.windowed,) = (tables for tables in self.kv.groups if tables.window)
        self.used: list[int] = []

    def launch(self, *args: Any) -> Ticket:
        for tables, group in zip(self.kv.groups, self.backend.engine.groups, strict=True):
            for state in (self.backend.states[node.name] for node in group.states):
                state.nan_to_num_(0)  # a block's cells behind the last token are multiplied by zero
                state[tables.pool._free] = torch.nan
        return self._launch(*args)

    def run(self, prompts: Sequence[Sequence[int]], new: int = NEW, **params: Any) -> Texts:
        done = queue.SimpleQueue[RequestOutput]()
        for index, prompt in enumerate(prompts):
            given = SamplingParams(**{"temperature": 0, "max_tokens": new, "ignore_eos": True, **params})
            self.executor.submit(Submission(str(index), tuple(prompt), given, done.put))  # type: ignore[arg-type]
        while self.executor.busy:
            self.executor.step()
            self.used.append(self.windowed.pool.num_used)
        self.executor.scheduler.check()
        outputs = sorted((done.get() for _ in prompts), key=lambda output: int(output.request_id))
        return [text.token_ids for output in outputs for text in output.outputs]


@pytest.mark.parametrize("prompts", [*([prompt] for prompt in PROMPTS), PROMPTS], ids=["3", "47", "90", "all"])
def test_it_says_what_generate_says_in_blocks_of_its_window(twin: tuple[Any, Engine, Path], prompts: Any) -> None:
    watched = Watched(twin, blocks=50, reuse=False)
    texts = watched.run(prompts)
    assert [list(text) for text in texts] == [generated(twin[0], prompt, NEW).tokens for prompt in prompts]
    decoding = watched.used[-NEW + len(prompts) * 4 :]  # the prompts are done by then
    assert max(decoding) <= MOST * len(prompts) and watched.used[-1] == 0
    chunks = LIMITS["max_num_tokens"] // BLOCK
    assert max(watched.used) <= (MOST + 1) * len(prompts) + chunks, "windows' blocks and a step's, not whole prompts'"


def test_reuse_preemption_and_steps_ahead_change_no_token(twin: tuple[Any, Engine, Path]) -> None:
    prompts = [[*PROMPTS[2][:70], 5 + i] for i in range(4)]
    plain = Watched(twin, blocks=60, reuse=False).run(prompts)
    for in_flight in (1, 2):
        narrow = Watched(twin, blocks=14, in_flight=in_flight)
        assert narrow.run(prompts) == plain
        assert narrow.executor.scheduler.counters.reused_tokens >= 64
        tight = Watched(twin, blocks=9, in_flight=in_flight, whole=33)
        assert tight.run(prompts) == plain and tight.executor.scheduler.counters.preemptions > 0


def test_what_every_group_had_comes_back_from_the_host(twin: tuple[Any, Engine, Path]) -> None:
    plain, narrow = Watched(twin, blocks=60, reuse=False), Watched(twin, blocks=9, whole=20, hosts=60)
    for prompt in prompts_of((90, 91, 92)) * 2:
        assert narrow.run([prompt], new=40) == plain.run([prompt], new=40)
    assert all(tables.host.num_restored > 0 for tables in narrow.kv.groups)
    assert narrow.executor.scheduler.counters.reused_tokens == 3 * 80


def test_a_text_goes_on_from_its_last_window(twin: tuple[Any, Engine, Path]) -> None:
    """The blocks before are another's by then."""
    watched = Watched(twin, blocks=17)
    (text,) = watched.run(PROMPTS[2:])
    watched.run(prompts_of((17, 200))[1:], new=10)
    assert watched.windowed.pool.num_evicted > 0
    counters = watched.executor.scheduler.counters
    longer = [*PROMPTS[2], *text, 7]
    before = counters.reused_tokens
    (more,) = watched.run([longer], new=10)
    assert more == tuple(generated(twin[0], longer, 10).tokens)
    assert counters.reused_tokens - before == (len(longer) - 2) // BLOCK * BLOCK


def test_beams_share_a_window(twin: tuple[Any, Engine, Path]) -> None:
    params = {"use_beam_search": True, "beam_width": 3, "n": 3}
    watched, whole = Watched(twin, blocks=50, reuse=False), Watched(twin, blocks=50, reuse=False)
    whole.windowed.slide = lambda slot, position: None  # type: ignore[method-assign]
    assert watched.run(PROMPTS[1:2], 90, **params) == whole.run(PROMPTS[1:2], 90, **params)
    assert max(watched.used[-80:]) <= 3 * MOST < max(whole.used[-80:])


def test_pools_share_what_there_is(twin: tuple[Any, Engine, Path]) -> None:
    """Where memory is short, in the proportion of requests of four windows; else as much as all slots can use."""
    engine, (*whole, windowed) = twin[1], twin[1].groups
    least = least_blocks(engine, engine.profile)
    chunk = WINDOW + LIMITS["max_num_tokens"] - 2
    assert least == (*(1 + 256 // BLOCK for _ in whole), 1 + 1 + -(-chunk // BLOCK)) and windowed.window == WINDOW
    assert share_blocks(engine, kv_bytes(engine, least) - 1, engine.profile) is None
    assert share_blocks(engine, kv_bytes(engine, least), engine.profile) == least
    assert share_blocks(engine, 1 << 40, engine.profile) == (1 + 4 * 256 // BLOCK,) * len(least)
    blocks = share_blocks(engine, 40 * engine.block_bytes, engine.profile)
    assert blocks is not None and blocks == ((50, 30) if whole else (40,))  # of 80 tokens: 5 blocks, and 3
    assert kv_bytes(engine, blocks) <= 40 * engine.block_bytes
    (request,) = {request_bytes(engine, replace(engine.profile, max_batch_size=n)) for n in (1, 4)}
    assert request == kv_bytes(engine, [n - 1 for n in least])


def test_no_room_for_one_request_is_refused(twin: tuple[Any, Engine, Path]) -> None:
    need = kv_bytes(twin[1], least_blocks(twin[1], twin[1].profile))
    with pytest.raises(ResourceError, match=r"needs \d+ MiB; lower max_seq_len"):
        CpuBackend(twin[1], twin[2], kv_bytes=need - 1)
    kv = Executor(twin[1], CpuBackend(twin[1], twin[2], kv_bytes=need), None).kv
    assert kv.fits_pools(256) and [t.pool.num_blocks for t in kv.groups] == [*least_blocks(twin[1], twin[1].profile)]
