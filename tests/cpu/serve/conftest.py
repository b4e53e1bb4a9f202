from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock import LLM


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """The bundled model."""
    with LLM(device="cpu", dtype="float32", max_batch_size=16) as found:
        yield found
