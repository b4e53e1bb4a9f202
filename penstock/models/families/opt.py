"""OPT and Galactica: learned positions from the third row on; the 350m normalises behind, and embeds in fewer numbers
than it computes in. (Zhang et al. 2022.)"""

from __future__ import annotations

from penstock.ir import Value
from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import classic
from penstock.models.families import decoder as common
from penstock.models.families.decoder import assemble
from penstock.models.registry import Family
from penstock.models.storage import constant, rows
from penstock.spec import LayerNorm, LayerSpec, ModelSpec

OFFSET = 2  # rows of the table of positions before the first one's

_PARTS = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.out_proj",
    "mixer_norm": "self_attn_layer_norm",
    "feedforward_norm": "final_layer_norm",
    "feedforward.up": "fc1",
    "feedforward.down": "fc2",
}
_WHOLE = {
    "embedding": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "project_in": "model.decoder.project_in",
    "project_out": "model.decoder.project_out",
    "final_norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
}


def read(reader: Reader) -> ModelSpec:
    reader.spelt(intermediate_size="ffn_dim")
    reader.ignore(classic.TRAINING)
    hidden, limit = reader.size("hidden_size"), reader.size("max_position_embeddings", 2048)
    bias, width = reader.flag("enable_bias", True), reader.optional_size("word_embed_proj_dim", hidden)
    # Without weights of their own norms have neither factor nor bias: `source` gives a factor of one.
    norm = LayerNorm(1e-5, reader.flag("layer_norm_elementwise_affine", True))
    before, bare = reader.flag("do_layer_norm_before", True), reader.flag("_remove_final_layer_norm", False)
    mixer = classic.attention(classic.read_heads(reader), bias=bias)
    mlp = classic.read_mlp(reader, "activation_function", "relu", bias)
    layer = LayerSpec(mixer, mlp, norm, norm, residual="serial" if before else "post")
    return assemble(
        reader, [layer] * common.read_layers(reader), norm if before and not bare else None, limit, tied=True,
        learned_positions=limit, embedding_size=0 if width == hidden else width,
    )  # fmt: skip


def source(wanted: Wanted) -> Value | str:
    part = wanted.part.rpartition(".")[0]
    if part.endswith("_norm") and not _affine(wanted.spec):
        return constant(wanted, 1.0)
    name = common.named(wanted, "model.decoder.layers.{}", _PARTS, _WHOLE)
    if part == "positions":
        count, hidden = wanted.shape
        return rows(wanted.tensor(name, count + OFFSET, hidden), OFFSET, count + OFFSET)
    return name


def _affine(spec: ModelSpec) -> bool:
    norm = spec.final_norm or spec.layers[0].mixer_norm
    return isinstance(norm, LayerNorm) and norm.bias


# The first files were saved from the model without its head.
FAMILY = Family("opt", ("OPTForCausalLM",), read, source, (), ((r"^decoder\.", "model.decoder."),))
