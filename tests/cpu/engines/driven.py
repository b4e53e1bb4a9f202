"""Tiny twins as engines: built from disk, run by the real executor, beside what Transformers says of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.errors import PenstockError
from penstock.formats import F32
from penstock.formats.tolerance import tolerance
from penstock.runtime.executor import Executor
from penstock.runtime.intake import Submission
from penstock.runtime.requests import RequestOutput, SamplingParams
from penstock.runtime.step import CpuBackend
from tests.cpu.models.twins import CASES, _sizes, save_twin, truth

NEW = 64
PROMPTS = (3, 61, 64, 65, 130)  # tokens; on both sides of a block's border and of a chunk's
# One slot less than prompts, so that the last joins late; chunks end in the middle of blocks.
LIMITS = {"max_batch_size": 4, "max_num_tokens": 48, "block_size": 64}


@dataclass
class Spoken:
    """What an engine said to one prompt: its tokens, and the logits that each was chosen from."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


@dataclass
class TwinEngine:
    """Transformers' model, and the engine made from the files that it saved."""

    model: Any
    engine: Engine
    directory: Path

    def greedy(self, prompts: Sequence[list[int]], new: int = NEW) -> list[Spoken]:
        """All prompts at once, through scheduler, uploads, slots and steps."""
        return speak(self.engine, CpuBackend(self.engine, self.directory), prompts, new)


def twin_engine(case: str, folder: Path, changes: Mapping[str, Any] | None = None) -> TwinEngine:
    """256 positions unless `changes` says otherwise, so that the longest prompt fits with its text."""
    keys = {*_sizes(CASES[case][0], {}), *CASES[case][1]}
    longer = {key: 256 for key in ("max_position_embeddings", "seq_length", "max_seq_len") if key in keys}
    model = save_twin(case, folder / "hf", {**longer, **(changes or {})})
    options = BuildOptions(device="cpu", dtype="float32", cache_dir=folder / "cache", **LIMITS)
    directory = build(folder / "hf", options, folder / "engine")
    return TwinEngine(model, store.load(directory), directory)


def prompts_of(lengths: Sequence[int], vocabulary: int = 99) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def speak(engine: Engine, backend: CpuBackend, prompts: Sequence[list[int]], new: int) -> list[Spoken]:
    """Greedy texts of `new` tokens each, end of text ignored."""
    executor = Executor(engine, backend, None)
    spoken = [Spoken(list(p)) for p in prompts]
    heard: list[int] = []  # whose tokens this step gave, in the order of its logit rows

    def submit(index: int) -> None:
        def sink(output: RequestOutput | PenstockError) -> None:
            if isinstance(output, PenstockError):
                raise output
            spoken[index].tokens = list(output.outputs[0].token_ids)
            spoken[index].logits.append(backend.last["logits"][len(heard)].clone())
            heard.append(index)

        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        executor.submit(Submission(str(index), tuple(prompts[index]), params, sink, streaming=True))

    for index in range(len(prompts)):
        submit(index)
    while executor.busy:
        heard.clear()
        executor.step()
    executor.scheduler.check()
    assert executor.kv.usage == 0
    return spoken


@torch.no_grad()
def generated(model: Any, prompt: list[int], new: int = NEW) -> Spoken:
    """What Transformers' own generate says, with its cache; it may not stop at an end of text."""
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=new,
        do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return Spoken(prompt, out.sequences[0, len(prompt) :].tolist(), [row[0] for row in out.logits])


def judged(model: Any, ours: Spoken) -> Spoken:
    """What Transformers chooses behind every one of our tokens, in one pass over the whole text without a cache.

    The one way to ask a rope that depends on length for what holds from the first token of the request on.
    """
    count = len(ours.prompt)
    logits = truth(model, ours.prompt + ours.tokens)[count - 1 : -1]
    return Spoken(ours.prompt, logits.argmax(-1).tolist(), list(logits))


def difference(ours: Spoken, theirs: Spoken) -> float:
    """The largest difference of two logits, relative to the largest logit of its row."""
    got, want = torch.stack(ours.logits), torch.stack(theirs.logits)
    return float(((got - want).abs().amax(-1) / want.abs().amax(-1)).max())


def assert_same(ours: Spoken, theirs: Spoken) -> None:
    """The same tokens, and logits that differ by no more than float32's tolerance."""
    assert ours.tokens == theirs.tokens
    assert difference(ours, theirs) <= tolerance(F32).logits
