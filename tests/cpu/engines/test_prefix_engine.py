"""ChatGLM-6B, whose prompts see all of themselves: its graph and engine against a reference of our own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock import LLM, SamplingParams
from penstock.compiler import backend
from penstock.compiler import build as building
from penstock.compiler import weights as compiled_weights
from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
from penstock.compiler.weights import compute
from penstock.engine import store
from penstock.engine.device import H200
from penstock.engine.sound import flaws
from penstock.errors import ConfigError, OptionError, PromptError, SamplingError, UnsupportedError
from penstock.models import build_forward, load_config, read_spec, weights
from penstock.models.checkpoint import Checkpoint
from penstock.runtime.executor import Executor
from penstock.runtime.intake import Submission
from penstock.runtime.requests import RequestOutput
from penstock.runtime.step import CpuBackend
from penstock.text.generation import generation_facts
from tests.cpu.cli.test_inspect_gpu import FakeWorkshop
from tests.cpu.engines.driven import Spoken, TwinEngine, assert_same, prompts_of, speak
from tests.cpu.models.harness import Pool, Request, greedy, load_tensors, run_step
from tests.cpu.models.reference.chatglm6b import ChatGlm6b

END, GMASK, MASK = 96, 95, 94
CONFIG: dict[str, Any] = {
    "model_type": "chatglm", "vocab_size": 99, "hidden_size": 48, "inner_hidden_size": 80, "num_layers": 2,
    "num_attention_heads": 4, "layernorm_epsilon": 1e-5, "max_sequence_length": 160, "position_encoding_2d": True,
    "bos_token_id": END, "eos_token_id": 97, "gmask_token_id": GMASK, "mask_token_id": MASK, "pad_token_id": 3,
    "use_cache": True, "pre_seq_len": None, "quantization_bit": 0, "prefix_projection": False,
}  # fmt: skip
LENGTHS = (0, 6, 13, 16, 30, 39)  # of what sees itself, but for the mark
NEW = 40
LIMITS = {"max_batch_size": 4, "max_num_tokens": 48, "max_seq_len": 112, "block_size": 16}


def saved(folder: Path, **changes: Any) -> ChatGlm6b:
    """Random weights, of which no norm or bias is neutral; the published files store the tied head as well."""
    torch.manual_seed(5)
    model = ChatGlm6b(CONFIG | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.copy_(torch.randn_like(parameter) * 1.3 * parameter.shape[-1] ** -0.5)
    model.eval().save_pretrained(folder)
    return model


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Each a text, a mark and the token that begins the answer; one has some of its answer given."""
    texts = [[token % 94 for token in text] for text in prompts_of(lengths)]
    marks = [MASK if i == 2 else GMASK for i in range(len(texts))]
    made = [[*text, mark, END] for text, mark in zip(texts, marks, strict=True)]
    return [*made[:-1], [*made[-1], 5, 17, 8]] if len(made) > 1 else made


def judged(model: ChatGlm6b, ours: Spoken) -> Spoken:
    """What the reference chooses behind each of our tokens, in one pass without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([ours.prompt + ours.tokens])).logits[0, len(ours.prompt) - 1 : -1]
    return Spoken(ours.prompt, logits.argmax(-1).tolist(), list(logits))


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> TwinEngine:
    folder = tmp_path_factory.mktemp("glm")
    model = saved(folder / "hf")
    options = BuildOptions(device="cpu", dtype="float32", cache_dir=folder / "cache", **LIMITS)  # type: ignore[arg-type]
    directory = build(folder / "hf", options, folder / "engine")
    return TwinEngine(model, store.load(directory), directory)


@pytest.mark.parametrize("tied", [True, False])
def test_the_graph_says_what_the_reference_says(tied: bool, tmp_path: Path) -> None:
    model = saved(tmp_path, tie_word_embeddings=tied, num_layers=3)
    config = load_config(tmp_path)
    spec = read_spec(config)
    binding = weights(spec, config, "f32")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check(binding, ())
    graph, tensors = build_forward(spec, binding, "f32", 8), load_tensors(checkpoint, binding)
    alone = [greedy(partial(run_step, graph, Pool(graph, tensors)), [asked(p)], NEW)[0] for p in prompts()]
    together = [asked(p) for p in prompts()]
    step = partial(run_step, graph, Pool(graph, tensors, seed=1), pad_tokens=3, pad_rows=1)
    mixed = greedy(step, together, NEW, joins=(4, 0, 2, 7))
    for prompt, request, single, ours in zip(prompts(), together, alone, mixed, strict=True):
        spoken = Spoken(prompt, request.tokens[len(prompt) :], list(ours))
        assert_same(spoken, judged(model, spoken))
        assert torch.equal(single, ours), "neighbours, padding and other blocks change no bit"


def asked(prompt: list[int]) -> Request:
    """The harness hands on the length of `source` as that of what is read whole."""
    return Request(list(prompt), source=prompt[: prompt.index(END)])


def test_ragged_prompts_say_what_the_reference_says(twin: TwinEngine) -> None:
    graph = twin.engine.programs["decode"].phases["forward"].graph
    assert {"prefix_attention", "prefix_rope", "split"} <= {node.op for node in graph.nodes}
    assert [group.name for group in twin.engine.groups] == ["prefix0"] and twin.engine.profile.encoder == 1
    for ours in twin.greedy(prompts(), NEW):
        assert len(ours.tokens) == NEW
        assert_same(ours, judged(twin.model, ours))


@pytest.mark.parametrize("in_flight", [1, 2])
def test_who_is_preempted_goes_on_as_if_alone(twin: TwinEngine, in_flight: int) -> None:
    """Ten blocks for texts of up to six each; what was generated is computed anew with the prompt, which may not see
    it, and is more than a step takes."""
    device = CpuBackend(twin.engine, twin.directory)
    device.num_blocks, device.steps_in_flight = (11,), in_flight
    executor, found = Executor(twin.engine, device, None), dict[str, RequestOutput]()
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    given = prompts()
    for index, prompt in enumerate(given):
        sink: Any = partial(found.__setitem__, str(index))
        executor.submit(Submission(str(index), tuple(prompt), params, sink))
    while executor.busy:
        executor.step()
        executor.scheduler.check()
    assert executor.scheduler.counters.preemptions > 0 and executor.scheduler.counters.reused_tokens == 0
    assert executor.kv.usage == 0 and not executor.snapshot()["prefix_caching"]
    for index, prompt in enumerate(given):
        alone = speak(twin.engine, CpuBackend(twin.engine, twin.directory), [prompt], 60)[0]
        assert list(found[str(index)].outputs[0].token_ids) == alone.tokens
        assert alone.tokens == judged(twin.model, alone).tokens


@pytest.fixture(scope="module")
def llm(twin: TwinEngine) -> Any:
    with LLM(twin.directory, device="cpu", skip_tokenizer_init=True) as model:
        yield model


def test_texts_of_one_prompt_and_beams(llm: LLM, twin: TwinEngine) -> None:
    """A prompt asked for twice is computed twice; beams that fork keep its prefix."""
    prompt = {"prompt_token_ids": prompts()[4]}
    several = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    first, again = (llm.generate(prompt, several)[0].outputs for _ in range(2))
    assert [each.token_ids for each in first] == [each.token_ids for each in again]
    assert llm.stats()["prefix_cache_hits"] == 0
    beams = SamplingParams(use_beam_search=True, n=3, max_tokens=20, ignore_eos=True, length_penalty=0.0)
    best = llm.generate(prompt, beams)[0].outputs
    for text in best:
        with torch.no_grad():
            logits = twin.model(torch.tensor([[*prompts()[4], *text.token_ids]])).logits[0]
        steps = logits[len(prompts()[4]) - 1 : -1].log_softmax(-1)
        total = float(steps[range(20), list(text.token_ids)].sum())
        assert text.score == pytest.approx(total, abs=1e-3)


def test_what_it_cannot_do_is_refused_by_name(llm: LLM, twin: TwinEngine) -> None:
    def refused(kind: type[Exception], match: str, prompt: list[int], **params: Any) -> None:
        with pytest.raises(kind, match=match):
            llm.generate({"prompt_token_ids": prompt}, SamplingParams(**params))

    refused(PromptError, r"has no token 96, .* end it with \[95, 96\]", [5, 6, GMASK])
    refused(PromptError, r"token 96 at position 2, and the mark .*nowhere, not right before", [5, 6, END])
    refused(PromptError, r"token 96 at position 3, .* first at position 0, not right", [GMASK, 5, GMASK, END])
    refused(PromptError, r"first at position 3, not right before", [5, MASK, END, GMASK])
    refused(PromptError, r"begins with 49 tokens .*max_num_tokens=48.*shorten", [*[5] * 48, GMASK, END])
    refused(SamplingError, r"prompt_logprobs=1 asks .* prompt, whose tokens see", prompts()[0], prompt_logprobs=1)
    with pytest.raises(OptionError, match=r"host_cache_size=1000000 .* \(prefix0\); leave it out"):
        LLM(twin.directory, device="cpu", skip_tokenizer_init=True, host_cache_size=1_000_000)
    with pytest.raises(UnsupportedError, match=r"inter_token_latency_target=0.1 is not built yet .* see themselves"):
        LLM(twin.directory, device="cpu", skip_tokenizer_init=True, inter_token_latency_target=0.1)


def test_it_is_planned_for_a_gpu(twin: TwinEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an H200, its timings made up: everything has a kernel."""
    monkeypatch.setattr(backend, "Workshop", FakeWorkshop)
    monkeypatch.setattr(building, "detect", lambda _: H200)
    monkeypatch.setattr(compiled_weights, "compute", lambda weight, source, device: compute(weight, source, "cpu"))
    options = BuildOptions(dtype="bfloat16", cache_dir=tmp_path / "cache", **{**LIMITS, "max_num_tokens": 256})  # type: ignore[arg-type]
    engine = store.load(build(twin.directory.parent / "hf", options, tmp_path / "engine"))
    phases = engine.programs["decode"].phases.values()
    plans = [plan for phase in phases for by_bucket in phase.plans.values() for plan in by_bucket.values()]
    assert {"whole", "halves"} <= {plan.tactic.partition("{")[0] for plan in plans} and engine.reads_prefix
    assert not [plan for plan in plans if plan.tactic == "reference"]


def test_a_manifest_says_where_prompts_end(twin: TwinEngine, tmp_path: Path) -> None:
    layer = twin.engine.model_spec.layers[0]
    assert (layer.residual, layer.residual_scale) == ("normed", 2.0)
    assert twin.engine.tokens["prefix"] == {"end": END, "marks": [GMASK, MASK]}
    without = replace(twin.engine, tokens={"eos": [97], "generation": {}})
    assert any("prefix has an id" in flaw for flaw in flaws(without))
    saved(tmp_path, gmask_token_id=None)
    with pytest.raises(ConfigError, match="no single id as gmask_token_id"):
        generation_facts(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_seq_len": 128}, "pre_seq_len = 128"),
        ({"quantization_bit": 4}, "quantization_bit = 4"),
        ({"position_encoding_2d": False}, "position_encoding_2d = False"),
        ({"num_attention_heads": 24}, "hidden_size = 48 .*multiple of 4"),
        ({"interleaved_qkv": True}, "unknown key interleaved_qkv"),
    ],
)
def test_other_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_spec({"architectures": ["ChatGLMModel"], **CONFIG, **changes})
