"""The command line: `penstock VERB`. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, 1 for a failure, 2 for a mistake of the caller, 130 when interrupted."""
    try:
        from penstock.cli.app import run

        return run(args)
    except KeyboardInterrupt:  # while modules are still being imported
        print("interrupted", file=sys.stderr)
        return 130
