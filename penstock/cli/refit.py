"""`penstock refit`: other weights of the same spec into an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penstock.cli import flags
from penstock.cli.console import Progress, amount, counted, result, say


def refit(
    engine: flags.Engine,
    checkpoint_dir: Annotated[
        str,
        typer.Option(
            "--checkpoint_dir",
            metavar="DIR",
            help="The new weights, in the layout that the engine was built from; or a hub name.",
        ),
    ],
    output_dir: Annotated[
        Path | None,
        typer.Option("--output_dir", metavar="DIR", help="Where the refitted engine goes; default: in place."),
    ] = None,
    plugin: flags.Plugin = None,
) -> None:
    """Swap in other weights of the same spec; nothing is timed or compiled. Prints the engine's directory.

    The checkpoint has to be in the layout that the engine was built from: Hugging Face's, or that of `convert` for as
    many ranks. An engine remembers how its weights are made from tensors by name.
    """
    from penstock.compiler.refit import refit as swap
    from penstock.engine import store
    from penstock.models.hub import resolve

    with Progress() as progress:
        target = swap(engine, resolve(checkpoint_dir), output_dir, progress=progress)
    opened = store.load(target)
    where = "in place" if output_dir is None else "in a new engine"
    say(
        f"refitted {where}: {counted(len(opened.weights), 'weight')}, {amount(opened.weight_bytes)}, now of "
        f"{checkpoint_dir}; tactics, kernels and limits are as they were"
    )
    result(str(target))
