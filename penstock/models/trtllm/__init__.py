"""TensorRT-LLM's checkpoints: `config.json` and one `rank<i>.safetensors` for each rank, read and written.

The layout is NVIDIA's published one; tests/facts/SOURCES.md cites where each fact of it was read. What such a config
cannot say is taken as it stands: Mistral's sliding window was an option of its runtime, so a checkpoint made by
NVIDIA's converter attends to everything; Gemma's norms are stored as the factors that they are, rounded to the dtype.
"""

from __future__ import annotations

from penstock.models.trtllm.config import Description, describe, is_trtllm
from penstock.models.trtllm.fields import NAMES, write_config
from penstock.models.trtllm.merge import Merged, merge, stored_factors, tied_copies
from penstock.models.trtllm.ranks import Ranks
from penstock.models.trtllm.split import split

__all__ = [
    "NAMES",
    "Description",
    "Merged",
    "Ranks",
    "describe",
    "is_trtllm",
    "merge",
    "split",
    "stored_factors",
    "tied_copies",
    "write_config",
]
