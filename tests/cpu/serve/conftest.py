from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock import LLM
from tests.cpu.serve.real import RealEngine


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """The bundled model in this process, which says what is right."""
    with LLM(device="cpu", dtype="float32", max_batch_size=16) as found:
        yield found


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealEngine]:
    """And in a process of its own."""
    found = RealEngine(tmp_path_factory.mktemp("crashes"))
    yield found
    found.close()
