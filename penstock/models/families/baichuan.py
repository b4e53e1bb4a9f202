"""Baichuan 1 and 2: a Llama with q, k and v in one tensor; the 13B ones have ALiBi for rope. (Yang et al. 2023.)

The head of Baichuan 2 has rows of norm one, which its files do not: they are normalised as they are read.
"""

from __future__ import annotations

from typing import Any

from penstock.ir import Value, emit
from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.families.fused import fusing
from penstock.models.registry import Family
from penstock.spec import Alibi, Attention, Mlp, ModelSpec, Rope, alibi_slopes

_FUSED = fusing(common.source, "model.layers.{}.self_attn.W_pack")
_FIRST, _SECOND = 64000, 125696  # tokens, of either's vocabulary


def read(reader: Reader) -> ModelSpec:
    """A config of the 13B models has no `max_position_embeddings`, but their tokenizer's `model_max_length`."""
    rotary, length = reader.get("max_position_embeddings", None), reader.optional_size("model_max_length")
    limit = length if rotary is None and length else reader.size("max_position_embeddings")
    hidden = reader.size("hidden_size")
    if hidden == (4096 if rotary is None else 5120):  # of the published models 7B is 4096 wide, 13B 5120
        raise reader.refused("max_position_embeddings", rotary, f"it where hidden_size is 4096 alone, not {hidden}")
    reader.ignore(("_from_model_config", "z_loss_weight"))
    heads = common.read_heads(reader)
    size = heads.head_dim
    position: dict[str, Any] = {"rope": Rope(10000.0, size)} if rotary else {"bias": Alibi(alibi_slopes(heads.heads))}
    mixer = Attention(heads.heads, heads.kv_heads, size, size**-0.5, **position)
    mlp = Mlp(reader.size("intermediate_size"), reader.choice("hidden_act", common.SILU, "silu"))
    if (size := reader.size("vocab_size")) not in (_FIRST, _SECOND):
        raise reader.refused(
            "vocab_size", size, f"{_FIRST} (Baichuan 1) or {_SECOND} (Baichuan 2): it tells their heads"
        )
    return common.decoder(reader, [mixer] * common.read_layers(reader), mlp, common.read_norm(reader), limit)


def source(wanted: Wanted) -> Value | str:
    if wanted.name == "head.weight" and wanted.spec.vocab_size == _SECOND:
        return emit("unit_rows", wanted.tensor("lm_head.weight"))[0]
    return _FUSED(wanted)


FAMILY = Family("baichuan", ("BaichuanForCausalLM", "BaiChuanForCausalLM"), read, source, (common.ROTARY_BUFFERS,))
