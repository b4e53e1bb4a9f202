"""Low-rank adapters on the seven linears of every layer, saved in PEFT's format."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from model import Llama
from safetensors.torch import load_file, save_file
from torch import nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PREFIX = "base_model.model."


class LoraLinear(nn.Module):
    """y = W x + (alpha / rank) B A x (Hu et al. 2021); W is frozen, B starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * self.lora_B(self.lora_A(self.dropout(x)))  # type: ignore[no-any-return]


def attach(model: Llama, rank: int, alpha: float, dropout: float = 0.0) -> list[nn.Parameter]:
    """Wraps the target linears in place and freezes the rest; returns the parameters to train."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in TARGETS and isinstance(child, nn.Linear):
                setattr(module, name, LoraLinear(child, rank, alpha, dropout))
    return [p for p in model.parameters() if p.requires_grad]


def save(model: Llama, folder: Path, rank: int, alpha: float, base_name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _PREFIX + name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if ".lora_" in name
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(TARGETS),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(model: Llama, folder: Path) -> None:
    """Attaches the stored adapter to `model`, in place."""
    config = json.loads((folder / "adapter_config.json").read_text())
    attach(model, config["r"], config["lora_alpha"])
    stored = load_file(folder / "adapter_model.safetensors")
    result = model.load_state_dict({k.removeprefix(_PREFIX): v.float() for k, v in stored.items()}, strict=False)
    assert not result.unexpected_keys and not any(".lora_" in key for key in result.missing_keys)
