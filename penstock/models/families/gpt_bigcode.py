"""StarCoder and SantaCoder: a GPT-2 of one KV head, its matrices as usual. (Li et al. 2023.)"""

from __future__ import annotations

from penstock.ir import Value
from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import classic, gpt2
from penstock.models.families import decoder as common
from penstock.models.families.decoder import assemble
from penstock.models.registry import Family
from penstock.models.storage import fused_qkv
from penstock.spec import LayerSpec, ModelSpec

_RUNNER = (
    "inference_runner",
    "max_batch_size",
    "max_sequence_length",
    "pre_allocate_kv_cache",
    "validate_runner_input",
)


def read(reader: Reader) -> ModelSpec:
    reader.spelt(**classic.GPT_WORDS)
    reader.ignore(classic.SUMMARY + classic.PRECISION + _RUNNER)
    reader.only("scale_attn_weights", True)
    limit, norm = reader.size("max_position_embeddings", 1024), classic.read_norm(reader)
    heads = classic.read_heads(reader, 1 if reader.flag("multi_query", True) else None)
    reader.only("num_key_value_heads", heads.kv_heads)
    mixer = classic.attention(heads)
    mlp = classic.read_mlp(reader, "activation_function", "gelu_pytorch_tanh")
    layers = [LayerSpec(mixer, mlp, norm, norm)] * common.read_layers(reader)
    return assemble(reader, layers, norm, limit, tied=True, learned_positions=limit)


def source(wanted: Wanted) -> Value | str:
    name = common.named(wanted, "transformer.h.{}", gpt2.PARTS, gpt2.WHOLE)
    return fused_qkv(wanted, name, grouped=True) if classic.is_qkv(wanted) else name


FAMILY = Family("gpt_bigcode", ("GPTBigCodeForCausalLM",), read, source, gpt2.IGNORED)
