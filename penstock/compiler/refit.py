"""New weights of the same spec into an engine. Nothing is timed or compiled, and nothing that could is imported."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.compiler.identity import digest, tensor_facts, text_facts
from penstock.compiler.progress import Progress, counting, silent
from penstock.compiler.weights import write_weights
from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.errors import RefitError
from penstock.ir.graph import Type
from penstock.models.binding import declared
from penstock.models.checkpoint import Checkpoint
from penstock.models.directory import ModelDirectory
from penstock.text.files import text_files
from penstock.text.generation import generation_facts
from penstock.text.legacy import copy_text

SHOWN = 5  # differences that an error names
_REWRITTEN = (store.MANIFEST, store.FILES)


def refit(
    engine_dir: Path, checkpoint_dir: Path, output: Path | None = None, progress: Progress = silent,
    cache: Path | None = None,
) -> Path:  # fmt: skip
    """The engine with the checkpoint's weights. Returns its directory.

    That is `output`; or one of its own in `cache`, a folder of engines, where a second call finds it; or, without both,
    engine_dir itself. The engine's weight expressions are computed again on the other checkpoint. Tokenizer and
    generation settings go with the weights, where the checkpoint brings any. Raises RefitError where the model, or the
    names or shapes of its tensors, are not the engine's, and ModelError or CheckpointError where the checkpoint cannot
    be read; all of that before any work. Where it fails later, the engine stays as it was.
    """
    engine = store.load(engine_dir)
    model = ModelDirectory.open(checkpoint_dir)
    model = model if engine.model_spec.head else model.headless()
    _check_spec(engine, model)
    _check_tensors(engine, model)
    checkpoint = model.checkpoint()
    refitted = _renamed(engine, engine_dir, model, checkpoint)
    cached = cache is not None and output is None
    target = _named(cache, engine_dir, refitted) if cache and cached else output or engine_dir
    if cached and store.holds(target, refitted.source["key"]):
        progress("cached", 1, 1)
        return target
    with store.writing(target, ours=cached) as part:
        _copy(engine_dir, part, checkpoint_dir)
        written = counting("weights", engine.weight_bytes, progress)
        write_weights(engine.weights, checkpoint, part / store.weights_file(), "cpu", written)
        store.save(refitted, part)
    return target


def _check_spec(engine: Engine, model: ModelDirectory) -> None:
    theirs = json.loads(json.dumps(model.spec.to_json()))
    if found := list(_differences(json.loads(json.dumps(dict(engine.spec))), theirs, "")):
        raise RefitError(
            f"{model.path} is another model than the engine's: {'; '.join(found[:SHOWN])}"
            f"{_more(found)}; build an engine of its own"
        )


def _differences(ours: Any, theirs: Any, where: str) -> Iterator[str]:
    """layers[0].layer.mixer.heads: 4 in the engine, 8 in the checkpoint"""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys((*ours, *theirs)):
            yield from _differences(ours.get(key), theirs.get(key), f"{where}.{key}" if where else key)
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(a, b, f"{where}[{i}]")
    elif ours != theirs:
        yield f"{where}: {ours!r} in the engine, {theirs!r} in the checkpoint"


def _check_tensors(engine: Engine, model: ModelDirectory) -> None:
    ours = _read_by(engine)
    if not ours:
        raise RefitError(
            "the engine's weights are random numbers, not expressions over a checkpoint's tensors, so there is nothing "
            "to put new ones into; build an engine from the checkpoint"
        )
    theirs = declared(model.binding(engine.format))
    names = dict.fromkeys((*ours, *theirs))
    found = [f"{n}: {_shown(ours, n)} in the engine, {_shown(theirs, n)} in the checkpoint" for n in names
             if ours.get(n) != theirs.get(n)]  # fmt: skip
    if found:
        raise RefitError(
            f"{model.path} does not have the tensors that the engine's weights are made of: {'; '.join(found[:SHOWN])}"
            f"{_more(found)}; refit from a checkpoint in the layout that the engine was built from, or build again"
        )


def _read_by(engine: Engine) -> dict[str, Type]:
    """Checkpoint name -> type of every tensor in the engine's expressions."""
    leaves = (leaf for weight in engine.weights.values() for leaf in weight.expression.leaves("tensor"))
    return {leaf.name: leaf.types[0] for leaf in leaves}


def _shown(tensors: Mapping[str, Type], name: str) -> str:
    return str(list(tensors[name].shape)) if name in tensors else "absent"


def _more(found: list[str]) -> str:
    return f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""


def _renamed(engine: Engine, engine_dir: Path, model: ModelDirectory, checkpoint: Checkpoint) -> Engine:
    """The manifest, saying where the weights are from now; under another key, so that no build takes it for its own.

    `base` is the key of the engine as it was built: refitted twice it is as if refitted once, but for a tokenizer that
    only the first checkpoint brought.
    """
    own_text = bool(text_files(model.path))
    tokens = generation_facts(model.path) if own_text else engine.tokens
    base = engine.source.get("base", engine.source.get("key"))
    texts = text_facts(model.path) if own_text else text_facts(engine_dir)
    facts = [base, str(model.path.resolve()), tensor_facts(checkpoint), texts, dict(tokens)]
    source = {
        **engine.source,
        "model": str(model.path.resolve()),
        "config": dict(model.stored),
        "base": base,
        "key": f"refit-{digest(facts)}",
    }
    return replace(engine, source=source, tokens=tokens)


def _named(cache: Path, engine_dir: Path, refitted: Engine) -> Path:
    """NAME-refit-HASH; refitted again, NAME stays."""
    name = engine_dir.resolve().name.split("-refit-")[0]
    return cache / f"{name}-{refitted.source['key']}"


def _copy(old: Path, new: Path, model: Path) -> None:
    """All but what is written anew; the checkpoint's text files instead of the old ones, where it has any."""
    text = text_files(model)
    replaced = {store.weights_file(), *_REWRITTEN, *(str(f.relative_to(old)) for f in text_files(old) if text)}
    files = (p for p in old.rglob("*") if p.is_file() and str(p.relative_to(old)) not in replaced)
    store.copy(files, old, new)
    copy_text(model, new)
    (new / store.KERNELS).mkdir(exist_ok=True)
