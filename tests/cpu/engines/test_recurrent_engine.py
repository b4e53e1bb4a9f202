"""Mixers that keep a state by slot, as engines: alone, and beside attention, with requests that lose their blocks."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from penstock import LLM, SamplingParams
from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
from penstock.engine import store
from penstock.engine.groups import groups_of
from penstock.engine.manifest import Engine
from penstock.errors import ConfigError, UnsupportedError
from penstock.models import build_forward, read_spec, registry, weights
from penstock.models.config import Reader
from penstock.models.registry import Family, register
from penstock.runtime.executor import Executor
from penstock.runtime.intake import Submission
from penstock.runtime.requests import RequestOutput
from penstock.runtime.step import CpuBackend
from penstock.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm, Rope, StateSpace
from tests.cpu.engines.driven import PROMPTS, TwinEngine, assert_same, generated, prompts_of, twin_engine
from tests.facts.kv import kept
from tests.facts.tensors import published_config

NEW = 30


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> TwinEngine:
    return twin_engine("mamba2-groups-biases-tied", tmp_path_factory.mktemp("mamba"))


def test_ragged_prompts_say_what_generate_says(mamba: TwinEngine) -> None:
    for ours in mamba.greedy(prompts_of(PROMPTS)):
        assert_same(ours, generated(mamba.model, ours.prompt))


def test_delta_nets_beside_gated_attention(tmp_path: Path) -> None:
    twin = twin_engine("qwen3-next", tmp_path)
    assert [group.kind for group in (*twin.engine.groups, *twin.engine.by_slot)] == ["paged", "slots"]
    for ours in twin.greedy(prompts_of(PROMPTS)):
        assert_same(ours, generated(twin.model, ours.prompt))


def test_an_engine_without_a_cache_behind_the_front_door(mamba: TwinEngine) -> None:
    prompts = prompts_of((5, 60, 33, 70, 20, 9))
    with LLM(str(mamba.directory), device="cpu", skip_tokenizer_init=True) as llm:
        given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        for prompt, output in zip(prompts, llm.generate(given, greedy), strict=True):
            assert list(output.outputs[0].token_ids) == generated(mamba.model, prompt, 12).tokens
        stats = llm.stats()
        assert stats["kv_groups"] == {} and not stats["prefix_caching"] and stats["preemptions"] == 0
        with pytest.raises(UnsupportedError, match="state that cannot be forked"):
            llm.generate(given[0], SamplingParams(use_beam_search=True, beam_width=2, n=2, temperature=0))


def test_what_is_kept(mamba: TwinEngine) -> None:
    assert mamba.engine.groups == () and [group.name for group in mamba.engine.by_slot] == ["slots0"]
    channels, state = 48 + 2 * 4 * 16, 8 * 6 * 16
    assert mamba.engine.by_slot[0].unit_bytes == 3 * 4 * (channels * 2 + state)


@pytest.mark.parametrize("stem", ["mamba2-2.7b-hf", "Mamba-Codestral-7B-v0.1", "Qwen3-Next-80B-A3B-Instruct"])
def test_the_published_ones_keep_what_they_should(stem: str) -> None:
    config = published_config(stem)
    spec = read_spec(config)
    graph = build_forward(spec, weights(spec, config, "bf16"), "bf16", 64)
    (group,) = (each for each in groups_of(graph.leaves("state")) if each.by_slot)
    numbers = sum(prod(node.types[0].concrete({"N": 1})) for node in group.states)
    assert numbers == kept(config).state


# Beside attention: no family of ours yet, so one of the test's own

_NORM = Norm(1e-5)
_SPACE = LayerSpec(StateSpace(6, 8, 16, 2, 4, "silu", 1e-5), Mlp(40, "silu"), _NORM, _NORM)
_ALONE = replace(_SPACE, feedforward=None, feedforward_norm=None)
_HYBRID = ModelSpec(
    (_SPACE, replace(_ALONE, mixer=Attention(4, 2, 12, 12**-0.5, Rope(1e4, 12))), _ALONE), 99, 48, _NORM, 256
)
_LIMITS = {"max_batch_size": 3, "max_num_tokens": 24, "max_seq_len": 128, "block_size": 16}


def _read(reader: Reader) -> ModelSpec:
    reader.ignore(("dtype",))
    return _HYBRID


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Path]]:
    folder = tmp_path_factory.mktemp("hybrid")
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps({"architectures": ["Hybrid"], "dtype": "float32"}))
    options = BuildOptions("float32", "random", "cpu", cache_dir=folder / "cache", **_LIMITS)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        registry._load_built_in()
        patch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
        register(Family("hybrid", ("Hybrid",), _read, lambda wanted: wanted.name))
        directory = build(folder / "hf", options, folder / "engine")
        yield store.load(directory), directory


def _tokens(built: tuple[Engine, Path], blocks: int, prompts: list[list[int]]) -> tuple[list[tuple[int, ...]], int]:
    backend = CpuBackend(*built)
    backend.num_blocks = (blocks,)
    for name, state in backend.states.items():
        state.fill_(0.0 if name.endswith("kv") else 55.0)  # of somebody before
    executor, done = Executor(built[0], backend, None), queue.SimpleQueue[RequestOutput]()
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        executor.submit(Submission(str(index), tuple(prompt), params, done.put))  # type: ignore[arg-type]
    while executor.busy:
        executor.step()
    outputs = sorted((done.get() for _ in prompts), key=lambda output: int(output.request_id))
    return [output.outputs[0].token_ids for output in outputs], executor.scheduler.counters.preemptions


def test_requests_that_lost_their_blocks_begin_again(hybrid: tuple[Engine, Path]) -> None:
    engine = hybrid[0]
    assert [g.name for g in engine.groups] == ["paged1"] and [g.name for g in engine.by_slot] == ["slots0"]
    prompts = prompts_of((70, 3, 45, 64, 1))
    alone = [_tokens(hybrid, 40, [prompt])[0][0] for prompt in prompts]
    roomy, never = _tokens(hybrid, 40, prompts)
    scarce, often = _tokens(hybrid, 9, prompts)
    assert (never, often > 0) == (0, True) and len(set(map(str, alone))) == len(prompts)
    assert roomy == alone and scarce == alone


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_heads": 81}, "num_heads = 81"),
        ({"n_groups": 3}, "n_groups = 3"),
        ({"conv_kernel": 1}, "conv_kernel = 1"),
        ({"rms_norm": False}, "rms_norm = False"),
        ({"time_step_limit": [0.1]}, "time_step_limit"),
        ({"time_step_limit": [0.2, 0.1]}, "time_step_limit"),
        ({"time_step_limit": [0.2, "inf"]}, "time_step_limit"),
        ({"sliding_window": 4}, "unknown key sliding_window"),
    ],
)
def test_other_configs_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_spec({**published_config("mamba2-2.7b-hf"), **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"linear_num_value_heads": 33}, "linear_num_value_heads = 33"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim = 1"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 48}, "layer_types"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"num_nextn_predict_layers": 1}, "unknown key num_nextn_predict_layers"),
    ],
)
def test_other_configs_with_delta_nets_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_spec({**published_config("Qwen3-Next-80B-A3B-Instruct"), **changes})


def test_both_spellings_of_no_limit() -> None:
    config = published_config("mamba2-2.7b-hf")
    assert read_spec({**config, "time_step_limit": [0.0, {"__float__": "Infinity"}]}) == read_spec(config)
