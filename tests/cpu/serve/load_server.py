"""A real server before the simulated engine: `python -m tests.cpu.serve.load_server STEP_SECONDS`; prints its port."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from penstock.serve.config import ServeConfig
from penstock.serve.routes import ROUTES
from penstock.serve.server import open_server
from penstock.serve.supervisor import Supervisor


def main() -> None:
    with tempfile.TemporaryDirectory() as crashes:
        command = (sys.executable, "-m", "tests.cpu.serve.simulated", sys.argv[1])
        runner = Supervisor({}, command=command, crash_dir=Path(crashes))
        server = open_server(ServeConfig(port=0, log_level="warning"), runner, ROUTES)
        server.run(lambda: print(server.port, flush=True), lambda *_: None)


if __name__ == "__main__":
    main()
