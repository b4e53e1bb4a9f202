"""What is measured: a workload's shapes by name, or a model or engine that the caller has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock import bundled
from penstock.bench.records import Maker
from penstock.bench.workload import MODELS, VOCAB, write_model
from penstock.compiler.progress import Progress, silent
from penstock.compiler.timing_cache import cache_root
from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.llm import LLM

LIMITS = ("max_batch_size", "max_num_tokens", "max_seq_len")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model: its name in the records, what LLM takes, and whether its weights are random."""

    name: str
    model: str
    weights: str

    @property
    def note(self) -> str:
        return "random weights" if self.weights == "random" else ""


def find(model: str | None, weights: str = "checkpoint", cache_dir: Path | None = None) -> Subject:
    """The bundled model for None, a workload's name with random weights, or whatever LLM opens."""
    if model is None:
        return Subject("bundled", str(bundled.target()), "checkpoint")
    if model in MODELS and not Path(model).exists():
        return Subject(model, str(write_model(model, cache_root(cache_dir) / "workload")), "random")
    return Subject(Path(model).name, model, weights)


@dataclass(frozen=True)
class Opened:
    """A running model, its manifest, and the limits that it runs within."""

    subject: Subject
    llm: LLM
    engine: Engine
    limits: Mapping[str, int]

    @property
    def vocab(self) -> int:
        """The largest token id that prompts may hold."""
        return min(VOCAB, self.engine.vocab_size - 1)

    @property
    def figure(self) -> Maker:
        return Maker(self.subject.name, self.engine.formats)

    def refusal(self, batch: int, tokens: int) -> str:
        """Why so many requests of so many tokens each cannot run side by side; empty where they can."""
        return refusal(self.limits, batch, tokens, self.kv_tokens, self.engine.profile.block_size)

    @property
    def kv_tokens(self) -> int:
        return int(self.llm.stats()["kv_blocks"]) * self.engine.profile.block_size

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.llm.shutdown()


def refusal(limits: Mapping[str, int], batch: int, tokens: int, kv_tokens: int, block: int) -> str:
    """As `Opened.refusal`: the limit that is passed, with the numbers."""
    if batch > limits["max_batch_size"]:
        return f"{batch} requests exceed max_batch_size={limits['max_batch_size']}"
    if tokens > limits["max_seq_len"]:
        return f"{tokens} tokens a request exceed max_seq_len={limits['max_seq_len']}"
    need = batch * -(-tokens // block) * block
    return f"{need} tokens of KV exceed the pool's {kv_tokens}" if need > kv_tokens else ""


def open_subject(subject: Subject, progress: Progress = silent, **arguments: Any) -> Opened:
    """Build if needed, load and make ready. `arguments`: LLM's own; limits left out are the engine's."""
    given = {"enable_prefix_caching": False} | _given(arguments.items())  # prompts come again, and must cost the same
    llm = LLM(subject.model, weights=subject.weights, skip_tokenizer_init=True, progress=progress, **given)
    engine = store.load(llm.engine_dir)
    limits = {name: arguments.get(name) or getattr(engine.profile, name) for name in LIMITS}
    return Opened(subject, llm, engine, limits)


def _given(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if value is not None}
