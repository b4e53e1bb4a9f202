"""One file a lineage: how its config is read, and what its checkpoints call each weight."""

from __future__ import annotations
