"""The classic flow's first step: a model directory to a TensorRT-LLM checkpoint, a file for each rank.

Checkpoints of Megatron-LM and NeMo become Hugging Face directories instead, which every other step reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from penstock.compiler.options import FORMATS
from penstock.compiler.progress import Progress, counting, silent
from penstock.compiler.weights import write_weights
from penstock.engine import store
from penstock.engine.manifest import Weight
from penstock.errors import OptionError
from penstock.ir.graph import Graph, Value
from penstock.kernels.tactic import PLAIN
from penstock.models import foreign, trtllm
from penstock.models.checkpoint import SINGLE, Checkpoint
from penstock.models.config import stored_format
from penstock.models.directory import ModelDirectory
from penstock.models.registry import family_of
from penstock.models.trtllm.fields import KEPT
from penstock.spec import AnyAttention, ModelSpec, Moe
from penstock.text.legacy import copy_text


@dataclass(frozen=True)
class _Plan:
    """Everything about a conversion but the numbers."""

    config: dict[str, object]
    files: tuple[dict[str, Weight], ...]  # by rank
    checkpoint: Checkpoint

    @property
    def nbytes(self) -> int:
        return sum(weight.type.nbytes() for file in self.files for weight in file.values())


def convert(
    model_dir: Path, output_dir: Path, dtype: str = "auto", tp_size: int = 1, pp_size: int = 1,
    progress: Progress = silent, model_format: str = "hf",
) -> Path:  # fmt: skip
    """Write the checkpoint of tp_size * pp_size ranks, tensor by tensor; the tokenizer files go with it.

    model_dir: a Hugging Face directory, or a converted one to be dealt anew. dtype: "auto" keeps the stored one. The
    layout adds 1 to Gemma's norms and rounds the sum, so in 16 bits those are not what they were. Raises ModelError,
    CheckpointError, OptionError or UnsupportedError before any work; ResourceError when the disk is full. Nothing
    half-written is left; an earlier conversion in output_dir is replaced. model_format: "megatron" and "nemo" read
    safetensors shards of any number of ranks, and write a Hugging Face directory, which is never replaced: it bears no
    sign of having been converted. For it tp_size and pp_size are 1.
    """
    if model_format != "hf":
        return _convert_foreign(model_dir, output_dir, dtype, (tp_size, pp_size), progress, model_format)
    plan = _plan(model_dir, dtype, tp_size, pp_size)
    _check_output(model_dir, output_dir)
    with store.replacing(output_dir, "converting") as part:
        (part / "config.json").write_text(json.dumps(plan.config, indent=2))
        copy_text(model_dir, part)
        written = counting("convert", plan.nbytes, progress)
        for rank, weights in enumerate(plan.files):
            write_weights(weights, plan.checkpoint, part / f"rank{rank}.safetensors", "cpu", written)
    return output_dir


def _convert_foreign(
    model_dir: Path, output_dir: Path, dtype: str, ranks: tuple[int, int], progress: Progress, model_format: str
) -> Path:
    if model_format not in foreign.FORMATS:
        raise OptionError(f"model_format={model_format!r} is not one of hf, {', '.join(foreign.FORMATS)}")
    if ranks != (1, 1):
        again = "convert the Hugging Face directory that is written again, with the sizes"
        raise OptionError(f"tp_size={ranks[0]}, pp_size={ranks[1]} with model_format={model_format!r}: {again}")
    source = foreign.open_foreign(model_dir, model_format, _format(dtype))
    _check_output(model_dir, output_dir)
    weights = {name: _weight(value) for name, value in source.tensors.items()}
    with store.replacing(output_dir, "converting") as part:
        (part / "config.json").write_text(json.dumps(source.config, indent=2))
        copy_text(model_dir, part)
        written = counting("convert", sum(weight.type.nbytes() for weight in weights.values()), progress)
        write_weights(weights, source.checkpoint, part / SINGLE, "cpu", written)
    return output_dir


def _plan(model_dir: Path, dtype: str, tp: int, pp: int) -> _Plan:
    format = _format(dtype)
    source = ModelDirectory.open(model_dir)
    format = format or stored_format(source.config)
    family = family_of(source.config)
    _check_ranks(source.spec, tp, pp)
    # NVIDIA's converter of Gemma deals the embedding whenever there are ranks to deal it to, and no other's does.
    ranks = trtllm.Ranks(tp, pp, split_table=family.name == "gemma" and tp > 1)
    config = trtllm.write_config(source.spec, source.config, ranks, trtllm.NAMES[format])
    binding, exact = source.binding(format), source.binding("f32")
    files = trtllm.split(source.spec, binding, exact, ranks, family.architectures[0])
    weights = tuple({name: _weight(value) for name, value in file.items()} for file in files)
    return _Plan(config, weights, source.checkpoint())


def _weight(value: Value) -> Weight:
    return Weight(value.type, PLAIN, Graph((value,), ("weight",)))


def _format(dtype: str) -> str | None:
    if dtype != "auto" and dtype not in FORMATS:
        raise OptionError(f"dtype={dtype!r} is not one of auto, {', '.join(FORMATS)}")
    return None if dtype == "auto" else FORMATS[dtype]


def _check_ranks(spec: ModelSpec, tp: int, pp: int) -> None:
    if tp < 1 or pp < 1:
        raise OptionError(f"tp_size={tp}, pp_size={pp}: both must be at least 1")
    if pp > len(spec.layers):
        raise OptionError(f"pp_size={pp} exceeds the model's {len(spec.layers)} layers; lower it")
    for layer in spec.layers:
        mlp, mixer = layer.feedforward.expert if isinstance(layer.feedforward, Moe) else layer.feedforward, layer.mixer
        if not mlp or not isinstance(mixer, AnyAttention):
            continue  # what their layout has no words for is refused by name when its config is written
        heads, kv, size = mixer.heads, mixer.kv_heads, mlp.size
        if heads % tp or size % tp or (kv % tp and tp % kv):
            raise OptionError(
                f"tp_size={tp} does not divide the model's {heads} heads, {kv} KV heads (of which it may also be a "
                f"multiple) and {size} feed-forward columns; choose one that does"
            )


def _check_output(model_dir: Path, output_dir: Path) -> None:
    if output_dir.resolve() in (model_dir.resolve(), *model_dir.resolve().parents):
        raise OptionError(f"output_dir={output_dir} holds the model itself; name another directory")
    if output_dir.exists() and not _replaceable(output_dir):
        what = f"output_dir={output_dir} exists and is no converted checkpoint"
        raise OptionError(f"{what}; name an empty or a new directory")


def _replaceable(directory: Path) -> bool:
    """Whether it is an empty directory, or one that `convert` wrote."""
    if not directory.is_dir():
        return False
    try:
        return KEPT in json.loads((directory / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return not any(directory.iterdir())
