"""A checkpoint becomes an engine: the stages of a build, each timed and shown."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from penstock import plugins
from penstock.compiler import pipeline
from penstock.compiler.backend import Planned, Unplanned, open_shop, plan_engine
from penstock.compiler.candidates import Pins
from penstock.compiler.footprint import require_room
from penstock.compiler.identity import compiler_facts, digest, tensor_facts, text_facts
from penstock.compiler.lower import lower
from penstock.compiler.options import BuildOptions
from penstock.compiler.phases import controlled_graph, prepare_graph, sample_graph
from penstock.compiler.progress import Progress, counting, serial, silent
from penstock.compiler.timing_cache import cache_root
from penstock.compiler.weights import Writing
from penstock.compiler.work import work_of
from penstock.compiler.workers import Workshop
from penstock.engine import store
from penstock.engine.device import Device
from penstock.engine.groups import groups_of
from penstock.engine.profile import Profile
from penstock.engine.program import CONTROLLED_TAIL, TAIL
from penstock.ir.graph import Graph
from penstock.kernels.device import detect
from penstock.models.binding import random_binding
from penstock.models.checkpoint import Checkpoint
from penstock.models.decoder import build_forward
from penstock.models.encoder import build_encoder
from penstock.models.pooling import open_for
from penstock.models.registry import family_of
from penstock.text.generation import generation_facts
from penstock.text.legacy import copy_text


@dataclass(frozen=True)
class Frontend:
    """The device-independent half of a build, with what people want to see of it."""

    draft: Unplanned
    before: Graph
    after: Graph
    checkpoint: Checkpoint | None
    encoder: Graph | None = None  # as it was built
    encoding: Graph | None = None  # after the passes


def build(model: Path, options: BuildOptions, output: Path | None = None, progress: Progress = silent) -> Path:
    """The engine directory of a model, built unless the cache has it. Returns its path.

    model: a Hugging Face directory, or a TensorRT-LLM checkpoint (NVIDIA's, or one of `convert`). Raises ModelError,
    CheckpointError, OptionError before any work; SelectionError where no tactic runs an op; ResourceError when the
    disk is full. Nothing half-written is left; a damaged engine of the cache is built again and replaced.
    """
    plugins.load()
    device = detect(options.device)
    root = cache_root(options.cache_dir)
    seconds: dict[str, float] = {}
    with _stage("read", seconds, progress):
        front = read_model(model, options, device)
        require_room(front.draft, device)
        key = build_key(front, device)
    target = output or root / "engines" / f"{model.resolve().name}-{key}"
    return finish(front, key, model, target, output is None, device, root, options.pins, seconds, progress)


def finish(
    front: Frontend, key: str, text: Path | None, target: Path, ours: bool, device: Device, root: Path, pins: Pins,
    seconds: dict[str, float], progress: Progress,
) -> Path:  # fmt: skip
    """The engine of that key in `target`, made unless it is there. `text`: whose tokenizer files go with it; `ours`:
    the place is one of the cache's; `seconds`: of the stages so far."""
    front = replace(front, draft=replace(front.draft, source={**front.draft.source, "key": key}))
    if store.holds(target, key):
        progress("cached", 1, 1)
        return target
    with open_shop(device, root) as shop, store.writing(target, ours) as part:
        planned = _plan(front, device, root, pins, shop, part / store.weights_file(), seconds, serial(progress))
        write_engine(planned, front, text, part)
    return target


def _plan(
    front: Frontend, device: Device, root: Path, pins: Pins, shop: Workshop | None, path: Path,
    seconds: dict[str, float], progress: Progress,
) -> Planned:  # fmt: skip
    """Select tactics, and write the weights to `path`: on a GPU meanwhile those whose layout no choice can change.

    On a CPU one after the other, since what is timed needs the processors for itself.
    """
    start, draft = time.perf_counter(), front.draft
    types = {name: expression.outputs[0].type for name, expression in draft.weights.items()}
    written = counting("weights", sum(t.nbytes() for t in types.values()), progress)
    stage = partial(_stage, "weights", seconds, progress)
    with Writing(path, types, front.checkpoint, device.kind, written, stage, shop and shop.gpu) as weights:
        with _stage("select", seconds, progress):
            early = weights.begin if shop else None
            planned = plan_engine(draft, device, root, pins, progress, shop, early)
        weights.finish(planned.engine.weights)
    total = {"total": round(seconds.get("read", 0.0) + time.perf_counter() - start, 3)}
    return replace(planned, seconds={**seconds, **planned.seconds, **total})


def read_model(model: Path, options: BuildOptions, device: Device) -> Frontend:
    """Config, tensor headers and graph work; nothing of the weights is read."""
    opened, pooling = open_for(model, options.task)
    spec = opened.spec
    format = options.format(opened.config, device)
    kv_format = options.kv_format(format, device)
    profile = options.profile(spec, device)
    binding = opened.binding(format)
    checkpoint = None
    if options.weights == "random":
        binding = random_binding(binding)
    else:
        checkpoint = opened.checkpoint(binding)
    before = build_forward(spec, binding, format, profile.block_size, kv_format)
    encoder = build_encoder(spec, binding, format, profile.block_size, kv_format)
    after, results = pipeline.run(before)
    encoding, more = pipeline.run(encoder) if encoder else (None, ())
    lowered = lower(after, encoding) if encoding else lower(after)
    profile = profile.for_groups(groups_of(lowered.graph.leaves("state")))
    graphs = step_graphs(profile, spec.result_size, lowered.graph)
    runs = {"prepare": graphs["prepare"], "forward": lowered.others[0]} if encoding else {}
    source = {
        "model": str(model.resolve()), "weights": options.weights, "config": dict(opened.stored),
        "tactics": dict(options.pins),
    }  # fmt: skip
    draft = Unplanned(
        spec.to_json(), profile, format, graphs, lowered.weights, source,
        {**generation_facts(model), **pooling}, work_of(lowered.graph, profile), pipeline.report((*results, *more)),
        family_of(opened.config).name, runs,
    )  # fmt: skip
    return Frontend(draft, before, after, checkpoint, encoder, encoding)


def step_graphs(profile: Profile, width: int, forward: Graph) -> dict[str, Graph]:
    """The phases of a step around a lowered forward pass, whose rows of results have so many numbers."""
    return {
        "prepare": prepare_graph(profile),
        "forward": forward,
        TAIL: sample_graph(profile, width),
        CONTROLLED_TAIL: controlled_graph(profile, width),
    }


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
        "graphs": {name: {n: g.key() for n, g in phases.items()} for name, phases in draft.programs.items()},
        "weights": {name: expression.key() for name, expression in draft.weights.items()},
        "tokens": dict(draft.tokens),
        "compiler": compiler_facts(device),
    }
    return digest(facts)


def write_engine(planned: Planned, front: Frontend, text: Path | None, part: Path) -> None:
    """Every file but the weights and the inventory into the fresh directory `part`."""
    copy_kernels(planned, part / store.KERNELS)
    (part / store.TIMING).write_text(json.dumps(planned.timing, indent=1))
    (part / store.GRAPH).write_text(_printed(front))
    if text is not None:
        copy_text(text, part)
    store.save(replace(planned.engine, build_seconds=planned.seconds), part)


def _printed(front: Frontend) -> str:
    """The model's graph as built and after the passes, and every phase as a step runs it, whose numbers name values."""
    phases = "".join(f"\n# phase {name}, as it runs\n{graph}" for name, graph in front.draft.graphs.items())
    text = f"# as built\n{front.before}\n# after the passes\n{front.after}{phases}"
    if front.encoder is None:
        return text
    runs = f"\n# encoder, as it runs\n{front.draft.encode['forward']}"
    return f"{text}\n# encoder, as built\n{front.encoder}\n# encoder, after the passes\n{front.encoding}{runs}"


def copy_kernels(planned: Planned, folder: Path) -> None:
    """The binaries that the engine's plans name."""
    folder.mkdir()
    store.copy((planned.kernels / f"{key}.cubin" for key in planned.engine.kernels), planned.kernels, folder)


@contextmanager
def _stage(name: str, seconds: dict[str, float], progress: Progress) -> Iterator[None]:
    progress(name, 0, 0)
    start = time.perf_counter()
    yield
    seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 3)
    progress(name, 1, 1)
