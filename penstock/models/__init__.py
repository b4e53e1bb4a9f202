"""Models: config to spec, spec to graph, checkpoint tensors to weights."""

from __future__ import annotations

from penstock.models.binding import Binding, declared, random_binding, shapes
from penstock.models.checkpoint import Checkpoint
from penstock.models.config import load_config, stored_format
from penstock.models.decoder import build_forward, state_name
from penstock.models.encoder import build_encoder
from penstock.models.hub import resolve
from penstock.models.registry import Family, family_of, ignored_tensors, read_spec, register, weights

__all__ = [
    "Binding",
    "Checkpoint",
    "Family",
    "build_encoder",
    "build_forward",
    "declared",
    "family_of",
    "ignored_tensors",
    "load_config",
    "random_binding",
    "read_spec",
    "register",
    "resolve",
    "shapes",
    "state_name",
    "stored_format",
    "weights",
]
