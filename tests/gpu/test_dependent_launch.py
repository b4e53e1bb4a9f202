"""Programmatic dependent launch changes nothing but time: the same tokens, bit for bit, with it and without it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from penstock import LLM, SamplingParams
from penstock.bench.latency import settle
from penstock.bench.workload import LLAMA31_8B
from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
from penstock.engine import store
from penstock.engine.manifest import checksum

pytestmark = pytest.mark.gpu
REPLAYS = 1000
REQUESTS, LONGEST = 96, 200


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers as wide as an 8B model's: the kernels that serve one, chosen among the same candidates."""
    folder = tmp_path_factory.mktemp("dependent")
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA31_8B | {"num_hidden_layers": 2}))
    options = BuildOptions(
        weights="random", device="cuda", cache_dir=folder / "cache", max_batch_size=64, max_num_tokens=512,
        max_seq_len=1024,
    )  # fmt: skip
    return build(model, options)


def without(engine_dir: Path, target: Path) -> Path:
    """The same engine, whose kernels start only when the one before has ended."""
    with store.writing(target) as part:
        files = (f for f in engine_dir.rglob("*") if f.is_file() and f.name != store.FILES)
        store.copy(files, engine_dir, part)
        manifest = json.loads((part / store.MANIFEST).read_text())
        assert _switch_off(manifest) > 100, "few kernels are launched dependently"
        manifest["checksum"] = checksum({k: v for k, v in manifest.items() if k != "checksum"})
        (part / store.MANIFEST).write_text(json.dumps(manifest))
    return target


def _switch_off(data: Any) -> int:
    """How many launches were dependent."""
    if isinstance(data, list):
        return sum(map(_switch_off, data))
    if not isinstance(data, dict):
        return 0
    found = int(data.get("dependent", False) is True)
    if found:
        data["dependent"] = False
    return found + sum(map(_switch_off, data.values()))


def mixture() -> tuple[list[dict[str, list[int]]], list[SamplingParams]]:
    """Requests that join and leave at different times: prompts of 1 to 400 tokens, greedy and sampled."""
    numbers = random.Random(0)
    prompts = [
        {"prompt_token_ids": [numbers.randint(3, 30000) for _ in range(numbers.choice((1, 7, 60, 400)))]}
        for _ in range(REQUESTS)
    ]
    kinds: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 1.0, "top_k": 50, "top_p": 0.9}
    )  # fmt: skip
    params = [
        SamplingParams(
            max_tokens=numbers.randint(1, LONGEST), ignore_eos=True, seed=i, detokenize=False, **kinds[i % 3]
        )
        for i in range(REQUESTS)
    ]
    return prompts, params


def _tokens(engine: Path) -> tuple[list[list[int]], int]:
    """What mixed batches of every size generate in at least REPLAYS steps, and how many steps that were."""
    with LLM(engine, device="cuda", skip_tokenizer_init=True) as llm:
        settle(llm)  # which buckets are captured decides how a step is padded, and so how it rounds
        prompts, params = mixture()
        tokens: list[list[int]] = []
        while llm.stats()["steps"] < REPLAYS:
            for count in (REQUESTS, 1, 9):
                outputs = llm.generate(prompts[:count], params[:count])
                tokens += [list(o.outputs[0].token_ids) for o in outputs]
        return tokens, int(llm.stats()["steps"])


def test_a_thousand_replays_give_the_same_tokens_with_and_without_it(engine_dir: Path, tmp_path: Path) -> None:
    dependent, steps = _tokens(engine_dir)
    plain, same = _tokens(without(engine_dir, tmp_path / "plain"))
    assert steps == same >= REPLAYS
    assert dependent == plain
    print(f"{steps} replays, {sum(map(len, plain))} tokens alike")
