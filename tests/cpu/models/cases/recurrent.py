"""State spaces."""

from __future__ import annotations

from typing import Any

_MAMBA: dict[str, Any] = {
    "num_heads": 12, "head_dim": 8, "state_size": 16, "n_groups": 1, "chunk_size": 16, "vocab_size": 99,
    "hidden_size": 48, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("mamba2", _MAMBA),
    "mamba2-groups-biases-tied": (
        "mamba2",
        {
            **_MAMBA, "n_groups": 4, "use_bias": True, "tie_word_embeddings": True, "conv_kernel": 3, "expand": 1,
            "num_heads": 8, "head_dim": 6, "num_hidden_layers": 3, "layer_norm_epsilon": 1e-3,
        },
    ),
    "mamba2-limited-steps": (
        "mamba2",
        {**_MAMBA, "n_groups": 2, "use_conv_bias": False, "state_size": 5, "time_step_limit": [0.3, 0.9]},
    ),
}  # fmt: skip
