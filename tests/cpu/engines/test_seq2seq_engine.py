"""Encoder-decoders as engines: both programs built with all passes, run by the executor, equal to Transformers'."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from penstock import LLM, SamplingParams
from penstock.cli import main
from penstock.compiler import backend, weights
from penstock.compiler import build as building
from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
from penstock.compiler.refit import refit
from penstock.compiler.reselect import reselect
from penstock.compiler.weights import compute
from penstock.engine import store
from penstock.engine.device import CPU, H200
from penstock.engine.memory import arena_top, plan_run, request_bytes
from penstock.engine.program import FRONT, Program
from penstock.engine.sound import flaws
from penstock.errors import ConfigError, OptionError, PromptError, SamplingError, UnsupportedError
from penstock.runtime.executor import Executor
from penstock.runtime.intake import Submission
from penstock.runtime.requests import RequestOutput
from penstock.runtime.step import CpuBackend
from penstock.text.generation import generation_facts
from tests.cpu.cli.test_inspect_gpu import FakeWorkshop
from tests.cpu.engines.driven import NEW, Spoken, TwinEngine, assert_same, prompts_of, speak
from tests.cpu.models.twins import save_twin

INPUTS = (3, 61, 64, 65, 90)  # tokens; on both sides of a block's border, each run of the encoder takes one or two
# One slot less than inputs, so that the last joins late, in a run of its own beside those that decode.
LIMITS = {"max_batch_size": 4, "max_num_tokens": 130, "max_seq_len": 96, "block_size": 16}
FORCED = {"forced_bos_token_id": 7, "forced_eos_token_id": 3, "eos_token_id": 3}


def twin_of(case: str, folder: Path, said: dict[str, Any] | None = None) -> TwinEngine:
    """`said`: by its generation_config.json."""
    model = save_twin(case, folder / "hf")
    if said:
        model.generation_config.update(**said)
        model.generation_config.save_pretrained(folder / "hf")
    options = BuildOptions(device="cpu", dtype="float32", cache_dir=folder / "cache", **LIMITS)  # type: ignore[arg-type]
    directory = build(folder / "hf", options, folder / "engine")
    return TwinEngine(model, store.load(directory), directory)


@torch.no_grad()
def generated(model: Any, given: list[int], new: int = NEW, **asked: Any) -> Any:
    """What Transformers' own generate says, with its cache."""
    how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True, **asked}
    return model.generate(torch.tensor([given]), max_new_tokens=new, **how)


def spoken_by(model: Any, given: list[int]) -> Spoken:
    out = generated(model, given, output_logits=True)
    return Spoken(given, out.sequences[0, 1:].tolist(), [row[0] for row in out.logits])


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> TwinEngine:
    return twin_of("t5-v1.1", tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> TwinEngine:
    """One whose texts begin and end with forced tokens."""
    return twin_of("bart", tmp_path_factory.mktemp("bart"), FORCED)


@pytest.fixture(scope="module")
def llm(bart: TwinEngine) -> Iterator[LLM]:
    with LLM(bart.directory, device="cpu", skip_tokenizer_init=True) as model:
        yield model


@pytest.mark.parametrize("case", ["t5", "t5-v1.1", "t5-few-buckets", "bart", "bart-scaled-deep-decoder"])
def test_ragged_inputs_say_what_generate_says(case: str, tmp_path: Path) -> None:
    twin = twin_of(case, tmp_path)
    programs = {name: twin.engine.programs[name].phases["forward"].graph for name in ("decode", "encode")}
    assert {"cross_attention", "attention"} <= {node.op for node in programs["decode"].nodes}
    assert {"encoder_attention", "split"} <= {node.op for node in programs["encode"].nodes}
    assert [group.name for group in twin.engine.groups] == ["paged0", "cross1"]
    for ours in twin.greedy(prompts_of(INPUTS)):
        assert len(ours.tokens) == NEW
        cached = case not in ("t5-few-buckets", "bart-scaled-deep-decoder")  # for which theirs has too few layers
        assert_same(ours, spoken_by(twin.model, ours.prompt) if cached else judged(twin.model, ours))


@torch.no_grad()
def judged(model: Any, ours: Spoken) -> Spoken:
    """What Transformers chooses behind every one of our tokens, in one pass without a cache."""
    begun = torch.tensor([[model.generation_config.decoder_start_token_id, *ours.tokens[:-1]]])
    logits = model(input_ids=torch.tensor([ours.prompt]), decoder_input_ids=begun, use_cache=False).logits[0]
    return Spoken(ours.prompt, logits.argmax(-1).tolist(), list(logits))


def run(twin: TwinEngine, inputs: Sequence[list[int]], blocks: tuple[int, int], in_flight: int = 1) -> Executor:
    """All greedy to the end, and the same as alone."""
    backend = CpuBackend(twin.engine, twin.directory)
    backend.num_blocks, backend.steps_in_flight = blocks, in_flight
    executor, found = Executor(twin.engine, backend, None), dict[str, RequestOutput]()
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    for index, given in enumerate(inputs):
        executor.submit(Submission(str(index), tuple(given), params, partial(found.__setitem__, str(index))))  # type: ignore[arg-type]
    while executor.busy:
        executor.step()
        executor.scheduler.check()
    alone = [speak(twin.engine, CpuBackend(twin.engine, twin.directory), [given], NEW)[0] for given in inputs]
    assert [list(found[str(i)].outputs[0].token_ids) for i in range(len(inputs))] == [each.tokens for each in alone]
    assert [found[str(i)].prompt_token_ids for i in range(len(inputs))] == [*map(tuple, inputs)]
    assert executor.kv.usage == 0
    return executor


@pytest.mark.parametrize("in_flight", [1, 2])
def test_who_is_preempted_is_read_again(t5: TwinEngine, in_flight: int) -> None:
    """Ten blocks for texts of four each: some have to make room, and begin with their input."""
    executor = run(t5, prompts_of(INPUTS), (11, 25), in_flight)
    assert executor.scheduler.counters.preemptions > 0 and not executor.snapshot()["prefix_caching"]


def test_inputs_wait_for_room_beside_those_of_others(t5: TwinEngine) -> None:
    """Seven blocks of what the encoder makes: one input at a time, or a few short ones. Two alike share nothing."""
    lengths = (90, 3, 64, 64, 65, 5)
    executor = run(t5, [*prompts_of(lengths), prompts_of(lengths)[2]], (25, 8))
    assert executor.scheduler.counters.preemptions == 0 and executor.scheduler.counters.reused_tokens == 0


def test_one_run_reads_all_that_are_admitted(t5: TwinEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, runs = CpuBackend(t5.engine, t5.directory), list[tuple[int, int]]()
    encode = backend.encode
    monkeypatch.setattr(backend, "encode", lambda *given: (runs.append(given[1:]), encode(*given)))
    speak(t5.engine, backend, prompts_of(INPUTS), 4)
    assert runs == [(128, 3), (65, 1), (90, 1)]  # at most 130 tokens each


def test_forced_tokens_are_those_of_generate(llm: LLM, bart: TwinEngine) -> None:
    """Texts that a limit cuts end with the forced token; with one that ends them earlier, nothing is forced."""
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=0)
    assert llm.engine.tokens["decoder_start"] == [2, 7] and llm.engine.tokens["forced_end"] == 3
    for prompt, output in zip(*asked(llm, params), strict=True):
        want = generated(bart.model, prompt, 21, eos_token_id=3).sequences[0].tolist()
        text = output.outputs[0]
        assert [2, 7, *text.token_ids] == want and text.token_ids[-1] == 3
        assert text.logprobs is not None and len(text.logprobs) == len(text.token_ids)
        if len(text.token_ids) == 20 and text.finish_reason == "length":
            assert text.logprobs[-1] == {3: 0.0}


def asked(llm: LLM, params: SamplingParams) -> tuple[list[list[int]], list[RequestOutput]]:
    prompts = prompts_of((17, 90, 4))
    return prompts, llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)


def test_logprobs_are_those_of_the_decoder(llm: LLM, bart: TwinEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=9, logprobs=2, ignore_eos=True)
    for prompt, output in zip(*asked(llm, params), strict=True):
        text = output.outputs[0]
        begun = torch.tensor([[2, 7, *text.token_ids]])
        with torch.no_grad():
            logits = bart.model(input_ids=torch.tensor([prompt]), decoder_input_ids=begun).logits[0, 1:-1]
        theirs = logits.log_softmax(-1)[range(9), list(text.token_ids)]
        ours = torch.tensor([each[token] for each, token in zip(text.logprobs or (), text.token_ids, strict=True)])
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("ours", [{"n": 2}, {"beam_width": 4, "n": 3, "length_penalty": 2.0}])
def test_beams_share_what_the_encoder_made(llm: LLM, bart: TwinEngine, ours: dict[str, Any]) -> None:
    params = SamplingParams(use_beam_search=True, max_tokens=24, **ours)
    width = ours.get("beam_width", ours["n"])
    theirs = {"num_beams": width, "num_return_sequences": ours["n"], "length_penalty": ours.get("length_penalty", 1.0)}
    for prompt, output in zip(*asked(llm, params), strict=True):
        out = generated(bart.model, prompt, 25, eos_token_id=3, output_scores=True, **theirs)
        texts = [row[: row.index(3) + 1] if 3 in row else row for row in out.sequences[:, 2:].tolist()]
        assert [list(each.token_ids) for each in output.outputs] == texts
        scores = torch.tensor([each.score or 0.0 for each in output.outputs])
        assert torch.allclose(scores, out.sequences_scores, atol=1e-4)
    assert llm.stats()["kv_cache_usage"] == 0


def test_several_texts_of_one_input(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12)
    first, again = (llm.generate({"prompt_token_ids": [9, 8, 7]}, params)[0].outputs for _ in range(2))
    assert [each.token_ids for each in first] == [each.token_ids for each in again]
    assert len({each.token_ids for each in first}) == 3


def test_what_it_cannot_do_is_refused_by_name(llm: LLM, bart: TwinEngine) -> None:
    def refused(kind: type[Exception], match: str, tokens: int = 5, **params: Any) -> None:
        with pytest.raises(kind, match=match):
            llm.generate({"prompt_token_ids": [5] * tokens}, SamplingParams(**params))

    refused(SamplingError, r"prompt_logprobs=1 asks .* encoder", prompt_logprobs=1)
    refused(PromptError, r"has 97 tokens, the limit is 96: .* max_seq_len=96 .*shorten it", tokens=97)
    refused(SamplingError, r"min_tokens=95 behind a prompt of 2 tokens", min_tokens=95, max_tokens=95)
    with pytest.raises(OptionError, match=r"host_cache_size=1000000 .* \(cross1\); leave it out"):
        LLM(bart.directory, device="cpu", skip_tokenizer_init=True, host_cache_size=1_000_000)
    with pytest.raises(UnsupportedError, match=r"inter_token_latency_target=0.1 is not built yet .* encoder"):
        LLM(bart.directory, device="cpu", skip_tokenizer_init=True, inter_token_latency_target=0.1)


def test_what_a_request_takes(t5: TwinEngine) -> None:
    """96 positions of text and as many of input, in blocks of 16: six of each."""
    engine = t5.engine
    assert request_bytes(engine, engine.profile) == 6 * engine.block_bytes
    assert (engine.profile.tables, engine.profile.encoder) == (2, 1)
    assert engine.work["kv_bytes_per_token"] == engine.groups[0].unit_bytes / 16


@pytest.fixture(scope="module")
def for_a_gpu(t5: TwinEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model for an H200, its timings made up."""
    folder = tmp_path_factory.mktemp("gpu")
    options = BuildOptions(dtype="bfloat16", cache_dir=folder / "cache", **{**LIMITS, "max_num_tokens": 256})  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "Workshop", FakeWorkshop)
        patch.setattr(building, "detect", lambda _: H200)
        patch.setattr(weights, "compute", lambda weight, source, device: compute(weight, source, "cpu"))
        return build(t5.directory.parent / "hf", options, folder / "engine")


def test_both_programs_are_planned_for_a_gpu(for_a_gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = store.load(for_a_gpu)
    encode, profile = engine.programs["encode"], engine.profile
    assert list(encode.buckets) == [f"encode.T{t}" for t in profile.token_buckets] and list(encode.phases) == [*FRONT]
    for program in engine.programs.values():
        plans = [
            p for phase in program.phases.values() for by_bucket in phase.plans.values() for p in by_bucket.values()
        ]
        assert not [plan.tactic for plan in plans if plan.tactic == "reference"]
    tops = [arena_top(engine, program, name) for program in engine.programs.values() for name in program.buckets]
    assert max(tops) == engine.arena
    plan, low = plan_run(engine, 1 << 40), replace(profile, max_batch_size=2, max_num_tokens=40)
    assert plan.blocks == (1 + 4 * 6,) * 2 and plan_run(engine, 1 << 40, low).arena < plan.arena
    assert main(["inspect", str(for_a_gpu)]) == 0 and "cross_attention" in capsys.readouterr().out


def test_an_engine_whose_programs_do_not_fit_it_is_refused(t5: TwinEngine) -> None:
    engine = t5.engine
    for broken, flaw in (
        (replace(engine, tokens={"eos": []}), "decoder_start is a list of ids"),
        (replace(engine, programs={**engine.programs, "mystery": engine.programs["encode"]}), "'mystery' is none"),
        (replace(engine, programs={**engine.programs, "encode": Program({}, {})}), "there is no phase 'prepare'"),
    ):
        assert any(flaw in each for each in flaws(broken))


def test_selected_anew_it_says_the_same(t5: TwinEngine, tmp_path: Path) -> None:
    directory = reselect(t5.directory, CPU, tmp_path, {"linear": "reference"}, output=tmp_path / "again")
    again = TwinEngine(t5.model, store.load(directory), directory)
    assert [each.tokens for each in again.greedy(prompts_of((9, 40)), 8)] == [
        each.tokens for each in t5.greedy(prompts_of((9, 40)), 8)
    ]


def test_what_files_say_of_a_decoders_beginning(tmp_path: Path) -> None:
    def facts(config: dict[str, Any], **said: Any) -> dict[str, Any]:
        (tmp_path / "config.json").write_text(json.dumps({"is_encoder_decoder": True, "vocab_size": 50, **config}))
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
        found = generation_facts(tmp_path)
        return {key: found[key] for key in ("decoder_start", "forced_end")}

    old = {"decoder_start_token_id": 2, "forced_bos_token_id": 0, "forced_eos_token_id": [3, 4]}
    assert facts(old) == {"decoder_start": [2, 0], "forced_end": 3}
    assert facts(old, decoder_start_token_id=5) == {"decoder_start": [5, 0], "forced_end": 3}
    assert facts({"bos_token_id": 6}) == {"decoder_start": [6], "forced_end": None}
    for config, match in (
        ({}, "says neither decoder_start_token_id nor bos_token_id"),
        ({"decoder_start_token_id": 50}, "decoder_start_token_id = 50 holds 50, which is no token id from 0 to 49"),
    ):
        with pytest.raises(ConfigError, match=match):
            facts(config)


def test_other_weights_and_random_ones_go_in(t5: TwinEngine, tmp_path: Path) -> None:
    model = save_twin("t5-v1.1", tmp_path / "hf", {"initializer_factor": 0.5})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    model.save_pretrained(tmp_path / "hf")
    directory = refit(t5.directory, tmp_path / "hf", output=tmp_path / "engine")
    twin = TwinEngine(model, store.load(directory), directory)
    for ours in twin.greedy(prompts_of((9, 40)), 8):
        assert ours.tokens == generated(model, ours.prompt, 8).sequences[0, 1:].tolist()
    options = BuildOptions(weights="random", device="cpu", cache_dir=tmp_path / "cache", **LIMITS)  # type: ignore[arg-type]
    made = build(tmp_path / "hf", options, tmp_path / "random")
    (said,) = speak(store.load(made), CpuBackend(store.load(made), made), prompts_of((30,)), 8)
    assert len(said.tokens) == 8


def test_text_in_and_text_out(tmp_path: Path) -> None:
    """A tokenizer that ends every text, as T5's does, and words that begin with a space but at a text's start."""
    model = save_twin("t5", tmp_path / "hf")
    words = ["<pad>", "</s>", "<unk>", *(f"\u2581w{i}" for i in range(96))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "hf")
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    with LLM(tmp_path / "hf", device="cpu", cache_dir=tmp_path / "cache", max_seq_len=64) as llm:
        (output,) = llm.generate("w5 w17 w17 w80", params)
    assert output.prompt_token_ids == (8, 20, 20, 83, 1) == tuple(fast("w5 w17 w17 w80").input_ids)
    out = generated(model, list(output.prompt_token_ids), 9).sequences[0]
    assert output.outputs[0].text == fast.decode(out, skip_special_tokens=True) != ""


def test_beams_that_are_preempted_find_the_same(bart: TwinEngine) -> None:
    params = SamplingParams(use_beam_search=True, beam_width=2, n=2, max_tokens=30)

    def found(blocks: tuple[int, int]) -> tuple[list[Any], int]:
        backend, outputs = CpuBackend(bart.engine, bart.directory), dict[str, Any]()
        backend.num_blocks = blocks
        executor = Executor(bart.engine, backend, None)
        for index, given in enumerate(prompts_of((40, 17))):
            executor.submit(Submission(str(index), tuple(given), params, partial(outputs.__setitem__, str(index))))
        while executor.busy:
            executor.step()
            executor.scheduler.check()
        assert executor.kv.usage == 0
        texts = [[each.token_ids for each in outputs[str(i)].outputs] for i in range(2)]
        return texts, executor.scheduler.counters.preemptions

    (roomy, none), (tight, some) = found((30, 30)), found((6, 30))
    assert roomy == tight and none == 0 and some > 0
