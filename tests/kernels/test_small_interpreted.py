"""The small kernels, interpreted, against the references."""

from __future__ import annotations

import pytest

from tests.kernels.subprocess_cases import failures

TOPIC = "tests.kernels.cases.small"


@pytest.mark.parametrize(
    "ops",
    [
        ("rms_norm", "add_rms_norm", "head_rms_norm"),
        ("add", "scale", "split", "narrow", "embedding", "take_rows"),
        ("layer_norm", "add_layer_norm", "head_layer_norm", "activate", "glu", "clip", "softcap", "widen"),
        ("sample",),
        ("prepare", "commit"),
    ],
    ids=["norms", "streams", "pointwise", "sample", "step"],
)
def test_agrees_with_reference(ops: tuple[str, ...]) -> None:
    assert failures(TOPIC, ops) == []
