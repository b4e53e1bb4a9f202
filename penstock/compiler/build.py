"""A checkpoint becomes an engine: the stages of a build, each timed and shown."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from penstock.compiler import pipeline
from penstock.compiler.backend import Planned, Unplanned, plan_engine
from penstock.compiler.identity import compiler_facts, digest, tensor_facts, text_facts
from penstock.compiler.lower import lower
from penstock.compiler.options import BuildOptions
from penstock.compiler.phases import prepare_graph, sample_graph
from penstock.compiler.progress import Progress, counting, silent
from penstock.compiler.timing_cache import cache_root
from penstock.compiler.weights import write_weights
from penstock.compiler.work import work_of
from penstock.engine import store
from penstock.engine.device import Device
from penstock.ir.graph import Graph
from penstock.kernels.device import detect
from penstock.models.binding import random_binding
from penstock.models.checkpoint import Checkpoint
from penstock.models.decoder import build_forward
from penstock.models.directory import ModelDirectory
from penstock.text.files import text_files
from penstock.text.generation import generation_facts


@dataclass(frozen=True)
class Frontend:
    """The device-independent half of a build, with what people want to see of it."""

    draft: Unplanned
    before: Graph
    after: Graph
    checkpoint: Checkpoint | None


def build(model: Path, options: BuildOptions, output: Path | None = None, progress: Progress = silent) -> Path:
    """The engine directory of a model, built unless the cache has it. Returns its path.

    model: a Hugging Face directory, or a TensorRT-LLM checkpoint (NVIDIA's, or one of `convert`). Raises ModelError,
    CheckpointError, OptionError before any work; SelectionError where no tactic runs an op; ResourceError when the
    disk is full. Nothing half-written is left; a damaged engine of the cache is built again and replaced.
    """
    device = detect(options.device)
    root = cache_root(options.cache_dir)
    seconds: dict[str, float] = {}
    with _stage("read", seconds, progress):
        front = read_model(model, options, device)
        key = build_key(front, device)
    front = replace(front, draft=replace(front.draft, source={**front.draft.source, "key": key}))
    target = output or root / "engines" / f"{model.resolve().name}-{key}"
    if store.holds(target, key):
        progress("cached", 1, 1)
        return target
    with _stage("select", seconds, progress):
        planned = plan_engine(front.draft, device, root, options.pins, progress)
    with store.writing(target, ours=output is None) as part:
        write_engine(replace(planned, seconds=seconds), front, model, part, progress)
    return target


def read_model(model: Path, options: BuildOptions, device: Device) -> Frontend:
    """Config, tensor headers and graph work; nothing of the weights is read."""
    opened = ModelDirectory.open(model)
    spec = opened.spec
    format = options.format(opened.config, device)
    profile = options.profile(spec, device)
    binding = opened.binding(format)
    checkpoint = None
    if options.weights == "random":
        binding = random_binding(binding)
    else:
        checkpoint = opened.checkpoint()
    before = build_forward(spec, binding, format, profile.block_size)
    after, results = pipeline.run(before)
    lowered = lower(after)
    graphs = {
        "prepare": prepare_graph(profile),
        "forward": lowered.graph,
        "sample": sample_graph(profile, spec.vocab_size),
    }
    report = tuple({"pass": r.name, "fired": dict(r.fired), "nodes": [r.nodes_before, r.nodes_after]} for r in results)
    source = {
        "model": str(model.resolve()), "weights": options.weights, "config": dict(opened.stored),
        "tactics": dict(options.pins),
    }  # fmt: skip
    draft = Unplanned(
        spec.to_json(), profile, format, graphs, lowered.weights, source,
        generation_facts(model), work_of(lowered.graph, profile), report,
    )  # fmt: skip
    return Frontend(draft, before, after, checkpoint)


def build_key(front: Frontend, device: Device) -> str:
    """Identity of a build: model, tokenizer, tensor files' sizes and times, graphs, limits, pins, device and compiler.

    Left out: where the engine is put, and the weights' bytes (`--verify` compares those).
    """
    draft = front.draft
    facts = {
        "source": dict(draft.source),
        "files": tensor_facts(front.checkpoint) if front.checkpoint else [],
        "texts": text_facts(Path(draft.source["model"])),
        "profile": draft.profile.to_json(),
        "graphs": {name: graph.key() for name, graph in draft.graphs.items()},
        "weights": {name: expression.key() for name, expression in draft.weights.items()},
        "tokens": dict(draft.tokens),
        "compiler": compiler_facts(device),
    }
    return digest(facts)


def write_engine(planned: Planned, front: Frontend, model: Path, part: Path, progress: Progress) -> None:
    """Every file but the inventory into the fresh directory `part`."""
    seconds = dict(planned.seconds)
    with _stage("weights", seconds, progress):
        engine, path = planned.engine, part / store.weights_file()
        written = counting("weights", engine.weight_bytes, progress)
        write_weights(engine.weights, front.checkpoint, path, engine.device.kind, written)
    copy_kernels(planned, part / store.KERNELS)
    (part / store.TIMING).write_text(json.dumps(planned.timing, indent=1))
    (part / store.GRAPH).write_text(f"# as built\n{front.before}\n# after the passes\n{front.after}")
    store.copy(text_files(model), model, part)
    store.save(replace(planned.engine, build_seconds=seconds), part)


def copy_kernels(planned: Planned, folder: Path) -> None:
    """The binaries that the engine's plans name."""
    folder.mkdir()
    store.copy((planned.kernels / f"{key}.cubin" for key in planned.engine.kernels), planned.kernels, folder)


@contextmanager
def _stage(name: str, seconds: dict[str, float], progress: Progress) -> Iterator[None]:
    progress(name, 0, 0)
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)
    progress(name, 1, 1)
