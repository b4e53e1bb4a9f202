"""The vocabulary. Importing this package registers every op; each file holds the references of one kind.

References take and return torch tensors, compute in float32, and are rounded by the interpreter to the format of the
value that is born. Letters in shapes are those of the design: T tokens, S sequences, L logit rows, E hidden, H heads,
K KV heads, D head size, F feed-forward, V vocabulary, N blocks, B tokens in a block, M blocks in a table row.
"""

from __future__ import annotations

from penstock.ir.ops import attention, control, embed, encoder, fused, linear, moe, norm  # isort: skip
from penstock.ir.ops import latent, pointwise, position, prefix, recurrent, sample, state, weight  # isort: skip

__all__ = [
    "attention",
    "control",
    "embed",
    "encoder",
    "fused",
    "latent",
    "linear",
    "moe",
    "norm",
    "pointwise",
    "position",
    "prefix",
    "recurrent",
    "sample",
    "state",
    "weight",
]
