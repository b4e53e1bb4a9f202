"""What families older than Llama have in common: LayerNorm, biases, feed-forwards without a gate, own spellings."""

from __future__ import annotations

from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families.decoder import MAX_HEAD_DIM, Heads
from penstock.spec import Attention, LayerNorm, Mlp, Rope

GELU_TANH = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate")
ACTIVATIONS = dict.fromkeys(GELU_TANH, "gelu_tanh") | {
    "gelu": "gelu", "gelu_python": "gelu", "quick_gelu": "gelu_quick", "relu": "relu", "relu2": "relu2",
    "silu": "silu", "swish": "silu",
}  # fmt: skip

# Keys of configs of that time that say nothing about a forward pass.
TRAINING = (
    "activation_dropout", "attention_probs_dropout_prob", "classifier_dropout", "dropout", "embedding_dropout",
    "emb_pdrop", "init_std", "layerdrop", "residual_dropout",
)  # fmt: skip
SUMMARY = (  # of a head for classification; and notes of the files' first writers
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "_num_labels", "n_special", "output_past", "predict_special_tokens",
)  # fmt: skip
# How another library rounds: here scores and their softmax are always float32.
PRECISION = ("attention_softmax_in_fp32", "reorder_and_upcast_attn", "scale_attention_softmax_in_fp32")

GPT_WORDS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}
MASKS = r"(attn|attention)\.(bias|masked_bias)"  # causal masks saved as tensors


def read_heads(reader: Reader, kv_heads: int | None = None) -> Heads:
    """H heads of E/H numbers, over as many KV heads or `kv_heads`."""
    heads, hidden = reader.size("num_attention_heads"), reader.size("hidden_size")
    if hidden % heads or hidden // heads > MAX_HEAD_DIM:
        raise reader.refused("hidden_size", hidden, f"{heads} heads of at most {MAX_HEAD_DIM} numbers")
    kv = kv_heads or heads
    if heads % kv:
        raise reader.refused("num_attention_heads", heads, f"a multiple of the {kv} KV heads")
    return Heads(heads, kv, hidden // heads)


def attention(heads: Heads, rope: Rope | None = None, bias: bool = True) -> Attention:
    """Scores scaled by 1/sqrt(D); all products with biases, or none."""
    h, k, d = heads.heads, heads.kv_heads, heads.head_dim
    return Attention(h, k, d, d**-0.5, rope, qkv_bias=bias, out_bias=bias)


def read_mlp(reader: Reader, act: str, default: str, bias: bool = True) -> Mlp:
    """A feed-forward without a gate, four times as wide as the model unless the config says otherwise."""
    size = reader.optional_size("intermediate_size") or 4 * reader.size("hidden_size")
    return Mlp(size, reader.choice(act, ACTIVATIONS, default), bias, gated=False)


def read_norm(reader: Reader, key: str = "layer_norm_epsilon", bias: bool = True) -> LayerNorm:
    return LayerNorm(reader.number(key, 1e-5), bias)


def is_qkv(wanted: Wanted) -> bool:
    """Whether it is the weight or bias of one of the three products that many files store as one."""
    return wanted.part.startswith(("attention.q.", "attention.k.", "attention.v."))


def qkv(name: str) -> dict[str, str]:
    """The same stored name for all three."""
    return {f"attention.{part}": name for part in "qkv"}
