"""`penstock convert`: the first of the classic three steps."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from penstock.cli import flags
from penstock.cli.console import Progress, amount, counted, result, say


def convert(
    model_dir: Annotated[str, typer.Option("--model_dir", metavar="DIR", help="A model directory or hub name.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", metavar="DIR", help="Where the checkpoint goes.")],
    dtype: flags.Dtype = "auto",
    tp_size: Annotated[int, typer.Option("--tp_size", metavar="N", help="Slice each tensor for N ranks.")] = 1,
    pp_size: Annotated[int, typer.Option("--pp_size", metavar="N", help="Deal the layers to N stages.")] = 1,
    model_format: Annotated[
        str, typer.Option("--model_format", metavar="FORMAT", help="hf, or safetensors shards of megatron or nemo.")
    ] = "hf",
    plugin: flags.Plugin = None,
) -> None:
    """Write a checkpoint sliced for ranks, or a Hugging Face directory of Megatron's or NeMo's shards.

    Optional: `build` takes a Hugging Face directory itself.
    """
    from penstock.compiler.convert import convert as write
    from penstock.models.hub import resolve

    with Progress() as progress:
        source = resolve(model_dir) if model_format == "hf" else Path(model_dir).expanduser()
        target = write(source, output_dir, dtype, tp_size, pp_size, progress, model_format)
    files = sorted(target.glob("*.safetensors"))
    size = amount(sum(file.stat().st_size for file in files))
    what = f"{counted(len(files), 'file')} of weights, {size} in all"
    layout = "TensorRT-LLM" if model_format == "hf" else "Hugging Face"
    say(f"wrote {what}, with config and tokenizer, in {layout}'s layout")
    say(f"next: penstock build --checkpoint_dir {shlex.quote(str(target))}")
    result(str(target))
