"""The bundled model on the GPU: against the CPU's logits, and what serving must never do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock import LLM, SamplingParams, bundled
from penstock.bench.timeline import timeline
from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
from penstock.engine import store
from penstock.engine.memory import bucket_keys, least_budget, plan_run
from penstock.engine.program import PLAIN
from penstock.errors import ResourceError
from penstock.formats import BF16
from penstock.formats.tolerance import tolerance
from penstock.kernels import driver
from penstock.runtime import trace
from penstock.runtime.batch import Batch
from penstock.runtime.cuda import CudaBackend
from penstock.runtime.executor import Executor
from penstock.runtime.graphs import Kind
from penstock.runtime.intake import Submission
from penstock.runtime.open import Memory, RunLimits
from penstock.runtime.step import CpuBackend
from penstock.text.tokenizer import Tokenizer
from tests.forced import Forced

pytestmark = pytest.mark.gpu
PROMPTS, NEW = 100, 64
LIMITS = {"max_batch_size": 64, "max_num_tokens": 512, "max_seq_len": 512}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def engine_dir(cache: Path) -> Path:
    return build(bundled.target(), BuildOptions(device="cuda", cache_dir=cache, **LIMITS))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Passages of the held-out text, 5 to 60 tokens long."""
    text = "\n".join(json.loads(line)["text"] for line in bundled.heldout().read_text().splitlines())
    ids = Tokenizer.from_dir(bundled.target()).encode(text)
    return [ids[i * 311 : i * 311 + 5 + i * 55 // PROMPTS] for i in range(PROMPTS)]


@pytest.fixture(scope="module")
def llm(engine_dir: Path) -> Iterator[LLM]:
    with LLM(engine_dir, device="cuda") as model:
        yield model


def test_the_gpu_in_bf16_agrees_with_the_cpu(cache: Path, engine_dir: Path, prompts: list[list[int]]) -> None:
    """Forced along the CPU's text: 99 % of positions agree, and each that does not was a close call for the CPU."""
    cpu_dir = build(bundled.target(), BuildOptions(device="cpu", cache_dir=cache, **LIMITS))
    with LLM(cpu_dir, device="cpu") as cpu:
        outputs = cpu.generate(
            [{"prompt_token_ids": p} for p in prompts],
            SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True),
        )
    texts = [p + list(o.outputs[0].token_ids) for p, o in zip(prompts, outputs, strict=True)]
    agreed = total = 0
    for part in range(0, PROMPTS, 50):
        batch, counts = texts[part : part + 50], [len(p) for p in prompts[part : part + 50]]
        cpu_engine = store.load(cpu_dir)
        want = Forced(cpu_engine, CpuBackend(cpu_engine, cpu_dir)).run(batch, counts)
        gpu_engine = store.load(engine_dir)
        got = Forced(gpu_engine, CudaBackend(gpu_engine, engine_dir, Memory().budget())).run(batch, counts)
        for w, g in zip(want, got, strict=True):
            same = w.argmax(-1) == g.argmax(-1)
            log = w.log_softmax(-1)
            margin = log.amax(-1) - log.gather(-1, g.argmax(-1, keepdim=True))[:, 0]
            assert not (margin[~same] >= tolerance(BF16).margin).any(), (
                f"a clear call came out differently: {margin[~same].max()}"
            )
            agreed, total = agreed + int(same.sum()), total + same.numel()
    print(f"{agreed} of {total} positions agree")
    assert agreed >= 0.99 * total


def test_a_request_is_independent_of_its_neighbours(llm: LLM, prompts: list[list[int]]) -> None:
    """The same bucket sequence is bit-equal: alone twice, and again after others have come and gone."""
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    alone = [llm.generate({"prompt_token_ids": p}, params)[0].outputs[0].token_ids for p in prompts[:4]]
    llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    again = [llm.generate({"prompt_token_ids": p}, params)[0].outputs[0].token_ids for p in prompts[:4]]
    assert alone == again


def test_a_batch_differs_from_alone_only_where_the_call_is_close(
    cache: Path, llm: LLM, prompts: list[list[int]]
) -> None:
    """Other buckets round otherwise: a first difference is allowed where the CPU's margin is below the tolerance."""
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    alone = [llm.generate({"prompt_token_ids": p}, params)[0].outputs[0].token_ids for p in prompts[:40]]
    together = llm.generate([{"prompt_token_ids": p} for p in prompts], params)[:40]
    cpu_dir = build(bundled.target(), BuildOptions(device="cpu", cache_dir=cache, **LIMITS))
    engine = store.load(cpu_dir)
    backend = CpuBackend(engine, cpu_dir)
    differing = 0
    for prompt, one, output in zip(prompts, alone, together, strict=False):
        many = output.outputs[0].token_ids
        first = next((i for i, (a, b) in enumerate(zip(one, many, strict=True)) if a != b), None)
        if first is not None:
            differing += 1
            text = [*prompt, *one[:first]]
            (logits,) = Forced(engine, backend).run([text], [len(text)])
            log = logits[-1].log_softmax(-1)
            margin = float(log.max() - min(log[one[first]], log[many[first]]))
            assert margin < tolerance(BF16).margin, f"a clear call came out differently: {margin} nat"
    print(f"{differing} of {len(alone)} texts differ somewhere")


def test_serving_launches_nothing_outside_replays(llm: LLM, prompts: list[list[int]]) -> None:
    """Joins, leaves, prefill and decode: no kernel of ours is launched, one upload a step, and the host lags."""
    backend = at_rest(llm)
    launches, events = [], []
    plain_launch, start, read = driver.launch, backend.launch, backend.read
    driver.launch = lambda *a: launches.append(a)
    backend.launch = lambda *a: events.append("launch") or start(*a)
    backend.read = lambda t: events.append("read") or read(t)
    uploads, steps = backend.uploads, llm.stats()["steps"]
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            params = [
                SamplingParams(temperature=0.8, seed=i, max_tokens=5 + i % 40, ignore_eos=True) for i in range(PROMPTS)
            ]
            llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    finally:
        driver.launch, backend.launch, backend.read = plain_launch, start, read
    assert not launches
    assert backend.uploads - uploads <= llm.stats()["steps"] - steps
    assert not [e.key for e in profile.key_averages() if e.key.startswith("cudaLaunchKernel")]
    steady = events[2:-2]
    assert steady.count("launch") and all(a != b for a, b in pairwise(steady))
    assert events[:2] == ["launch", "launch"], "step 2 is launched before step 1 is read"


def at_rest(llm: LLM) -> CudaBackend:
    """Its backend, every bucket captured."""
    backend = llm._loop.executor.backend
    while llm._loop.call(backend.idle):
        pass
    return backend


def serve(llm: LLM, prompts: list[list[int]]) -> None:
    """Joins, leaves, prefill and decode, sampled in every way."""
    params = [
        SamplingParams(temperature=0.4 * (i % 3), top_k=i % 50, seed=i, max_tokens=5 + i % 40, ignore_eos=True)
        for i in range(len(prompts))
    ]
    llm.generate([{"prompt_token_ids": p} for p in prompts], params)


def test_serving_allocates_and_loads_nothing(
    llm: LLM, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither torch's allocator nor the driver gives memory out, and no binary is loaded."""
    at_rest(llm)
    serve(llm, prompts[:20])
    loads: list[object] = []
    plain = driver.load
    monkeypatch.setattr(driver, "load", lambda *a: loads.append(a) or plain(*a))
    before = llm.stats()["allocations"], torch.cuda.mem_get_info()[0]
    serve(llm, prompts)
    assert (llm.stats()["allocations"], torch.cuda.mem_get_info()[0]) == before
    assert not loads
    assert torch.cuda.memory_stats()["num_alloc_retries"] == 0


def test_load_without_a_pause_captures_what_it_misses(engine_dir: Path, prompts: list[list[int]]) -> None:
    """No moment is idle, and yet the same steps run in their own buckets at last."""
    engine = store.load(engine_dir)
    backend = CudaBackend(engine, engine_dir, Memory().budget())
    executor = Executor(engine, backend, None, reuse=False)
    missed: list[int] = []
    for _ in range(4):
        before, ended = backend.graphs.larger, []
        for i, each in enumerate(prompts[:24]):
            params = SamplingParams(temperature=0.0, max_tokens=5 + i, ignore_eos=True)
            executor.submit(Submission(str(i), tuple(each), params, ended.append))
        while executor.busy:
            executor.step()
        assert len(ended) == 24
        missed.append(backend.graphs.larger - before)
    backend.close()
    assert missed[0] > 0 and missed[-1] == 0, missed


def test_an_allocation_while_serving_is_counted(llm: LLM) -> None:
    """The hook that the test above relies on."""
    before, kept = llm.stats()["allocations"], torch.ones(3, device="cuda")
    assert llm.stats()["allocations"] == before + 1
    del kept
    llm._loop.executor.backend._allocated += 1


def test_the_process_uses_what_the_plan_says(engine_dir: Path, llm: LLM, prompts: list[list[int]]) -> None:
    """Within 3 %, or two pages of the driver's. `llm` has paid for the context."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    with LLM(engine_dir, device="cuda") as model:
        graphs = at_rest(model).graphs
        serve(model, prompts[:20])
        for key in bucket_keys(model.engine.profile):  # as if each had had a controlled step
            model._loop.call(partial(graphs.parts, *key))
        torch.cuda.synchronize()
        used, planned = before - torch.cuda.mem_get_info()[0], model.stats()["memory"]["total"]
        print(f"{used / 2**20:.1f} MiB used, {planned / 2**20:.1f} planned; loading: {model.stats()['load_seconds']}")
        assert abs(used - planned) <= max(0.03 * planned, 4 << 20)


def test_a_minimal_pool_is_enough_and_less_is_refused_before_any_work(
    engine_dir: Path, prompts: list[list[int]]
) -> None:
    limits = {"max_batch_size": 1, "max_num_tokens": 64, "max_seq_len": 128}
    engine = store.load(engine_dir)
    need = least_budget(engine, RunLimits(**limits).within(engine.profile))
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    with LLM(engine_dir, device="cuda", max_gpu_bytes=need, **limits) as model:
        assert len(model.generate({"prompt_token_ids": prompts[0]}, params)[0].outputs[0].token_ids) == 16
        assert model.stats()["kv_blocks"] == 2 and model.stats()["memory"]["total"] <= need + (2 << 20)
    held = torch.cuda.memory_allocated()
    with pytest.raises(ResourceError, match="may be used"):
        LLM(engine_dir, device="cuda", max_gpu_bytes=need - 1, **limits)
    assert torch.cuda.memory_allocated() == held
    assert plan_run(engine, 1 << 50).total > need


def test_weights_arrive_whole(engine_dir: Path) -> None:
    backend = CudaBackend(store.load(engine_dir), engine_dir, Memory().budget())
    wanted = load_file(engine_dir / store.weights_file())
    for name, weight in backend.graphs.memory.weights.items():
        assert torch.equal(weight.cpu(), wanted[name]), name
    backend.close()


def test_watched_steps_say_the_same(llm: LLM, prompts: list[list[int]]) -> None:
    """Node by node, eagerly, without the captured graph: the tokens are the replay's, and the logits theirs."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    plain = llm.generate({"prompt_token_ids": prompts[5]}, params)[0].outputs[0].token_ids
    watch = llm.watch(["logits"], 3)
    assert llm.generate({"prompt_token_ids": prompts[5]}, params)[0].outputs[0].token_ids == plain
    assert [int(seen.tensor.argmax()) for seen in watch.seen] == list(plain[:3])


@pytest.mark.parametrize("batch", [Batch(context=100), Batch(8, 100), Batch(tokens=200, temperature=0.7)])
def test_a_steps_timeline_is_recorded_launch_by_launch(engine_dir: Path, batch: Batch) -> None:
    engine = store.load(engine_dir)
    line = timeline(engine, engine_dir, batch, Memory(), print)
    assert line.how.startswith("CUPTI"), line.why
    phases = engine.programs["decode"].phases
    wanted = [n.op for name in PLAIN for n in phases[name].graph.nodes if not n.is_leaf]
    assert [node.op for node in line.nodes] == wanted
    assert 0.7 * line.step_us < line.seen_us < 1.5 * line.step_us


def test_without_cupti_events_time_the_nodes(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise trace.Unrecorded("there is no CUPTI here")

    monkeypatch.setattr(trace, "_recorded", absent)
    line = timeline(store.load(engine_dir), engine_dir, Batch(context=100), Memory(), print)
    assert line.how.startswith("events") and line.why == "there is no CUPTI here"
    assert all(node.busy_us > 0 for node in line.nodes)


def test_an_engine_runs_without_triton_and_the_compiler(engine_dir: Path) -> None:
    """Loading an engine compiles nothing: it works where neither can be imported."""
    program = f"""
import importlib.util, sys
def refused(name):
    return name.split(".")[0] == "triton" or name.startswith("penstock.compiler")
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if refused(name):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
plain = importlib.util.find_spec  # torch asks whether triton is there: it is not
importlib.util.find_spec = lambda name, package=None: None if refused(name) else plain(name, package)
from penstock.runtime import ModelRunner
with ModelRunner.from_dir({str(engine_dir)!r}) as runner:
    print(runner.generate(["In the beginning"], max_new_tokens=16)[0])
assert not [m for m in sys.modules if m.startswith(("triton", "penstock.compiler"))]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_sampling_with_a_seed_repeats(llm: LLM, prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=0.9, top_k=50, top_p=0.9, seed=7, max_tokens=32, ignore_eos=True)
    first, second = (llm.generate({"prompt_token_ids": prompts[0]}, params)[0].outputs[0].token_ids for _ in range(2))
    assert first == second


def test_refit_gives_what_a_fresh_build_gives(
    cache: Path, engine_dir: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """Other weights into the same engine: nothing is timed, the old memory is given back, and the texts are the new."""
    other = Path(shutil.copytree(bundled.target(), tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({k: v * 1.25 if k == "model.norm.weight" else v for k, v in weights.items()}, other / "model.safetensors")
    fresh = build(other, BuildOptions(device="cuda", cache_dir=cache, **LIMITS))
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=24, ignore_eos=True)
    asked = [{"prompt_token_ids": p} for p in prompts[:8]]

    def texts(model: LLM) -> list[tuple[int, ...]]:
        return [model.generate(p, params)[0].outputs[0].token_ids for p in asked]

    with LLM(fresh, device="cuda") as model:
        wanted = texts(model)
    with LLM(engine_dir, device="cuda", cache_dir=cache) as model:
        before, held = texts(model), torch.cuda.memory_allocated()
        model.refit(other)
        assert torch.cuda.memory_allocated() < 1.1 * held, "the old engine's memory was given back"
        after = texts(model)
    assert after == wanted != before


def test_single_tokens_say_the_same_with_and_without_what_they_need_not(
    engine_dir: Path, prompts: list[list[int]]
) -> None:
    """Bit-equal logits, decoding in buckets whose graphs leave launches out and in the whole ones."""
    engine, runs = store.load(engine_dir), []
    for whole in (False, True):
        backend = CudaBackend(engine, engine_dir, Memory().budget())
        while backend.idle():
            pass
        singles = [each for each in backend.graphs._captured if each[1] is Kind.SINGLES]
        assert singles
        for each in singles if whole else ():
            del backend.graphs._captured[each]
        runs.append(Forced(engine, backend).run(prompts[:40], [5] * 40))
        backend.close()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
