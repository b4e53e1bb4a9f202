"""Weights of the published dense decoders, by family: what the files call each tensor, and its shape.

Each function reads sizes from the published config alone and shares nothing with Penstock. What files hold besides
weights (buffers, copies of tied tables) is in `catalog.py`.
"""

from __future__ import annotations

from tests.facts.shapes import (
    Config,
    Tensors,
    attention,
    head_size,
    kv_heads,
    linear,
    llama_like,
    norm,
    prefixed,
    stack,
    swiglu,
)


def gpt2(c: Config) -> Tensors:
    """No prefix, and linears stored [in, out] (Conv1D)."""
    E = c["n_embd"]

    def layer(_: int) -> Tensors:
        yield from norm("ln_1", E, bias=True)
        for name, wide, rows in (("attn.c_attn", 3 * E, E), ("attn.c_proj", E, E)):
            yield f"{name}.weight", (rows, wide)
            yield f"{name}.bias", (wide,)
        yield from norm("ln_2", E, bias=True)
        for name, wide, rows in (("mlp.c_fc", 4 * E, E), ("mlp.c_proj", E, 4 * E)):
            yield f"{name}.weight", (rows, wide)
            yield f"{name}.bias", (wide,)

    yield "wte.weight", (c["vocab_size"], E)
    yield "wpe.weight", (c["n_positions"], E)
    yield from stack("h", c["n_layer"], layer)
    yield from norm("ln_f", E, bias=True)


def gptj(c: Config) -> Tensors:
    E = c["n_embd"]

    def layer(_: int) -> Tensors:
        yield from norm("ln_1", E, bias=True)
        for part in ("k", "v", "q", "out"):
            yield from linear(f"attn.{part}_proj", E, E)
        yield from linear("mlp.fc_in", 4 * E, E, bias=True)
        yield from linear("mlp.fc_out", E, 4 * E, bias=True)

    yield "transformer.wte.weight", (c["vocab_size"], E)
    yield from stack("transformer.h", c["n_layer"], layer)
    yield from norm("transformer.ln_f", E, bias=True)
    yield from linear("lm_head", c["vocab_size"], E, bias=True)


def gpt_neox(c: Config) -> Tensors:
    E, F = c["hidden_size"], c["intermediate_size"]

    def layer(_: int) -> Tensors:
        yield from norm("input_layernorm", E, bias=True)
        yield from norm("post_attention_layernorm", E, bias=True)
        yield from _megatron("attention", E, F, 3 * E, bias=True)

    yield "gpt_neox.embed_in.weight", (c["vocab_size"], E)
    yield from stack("gpt_neox.layers", c["num_hidden_layers"], layer)
    yield from norm("gpt_neox.final_layer_norm", E, bias=True)
    yield "embed_out.weight", (c["vocab_size"], E)


def falcon(c: Config) -> Tensors:
    """One norm a layer in the 7B form, two (`ln_attn`, `ln_mlp`) in the new form, two others without parallel_attn."""
    E = c["hidden_size"]
    H = c.get("num_attention_heads") or c["n_head"]
    new = c.get("new_decoder_architecture", False)
    K = c["num_kv_heads"] if new else 1 if c["multi_query"] else H

    def layer(_: int) -> Tensors:
        yield from _megatron("self_attention", E, 4 * E, (H + 2 * K) * (E // H), c["bias"])
        norms = ("ln_attn", "ln_mlp") if new else ("input_layernorm",)
        for name in norms if c["parallel_attn"] else ("input_layernorm", "post_attention_layernorm"):
            yield from norm(name, E, bias=True)

    yield "transformer.word_embeddings.weight", (c["vocab_size"], E)
    yield from stack("transformer.h", c.get("num_hidden_layers") or c["n_layer"], layer)
    yield from norm("transformer.ln_f", E, bias=True)


def mpt(c: Config) -> Tensors:
    """No biases at all, norms included."""
    E = c["d_model"]

    def layer(_: int) -> Tensors:
        yield from norm("norm_1", E)
        yield from linear("attn.Wqkv", 3 * E, E)
        yield from linear("attn.out_proj", E, E)
        yield from norm("norm_2", E)
        yield from linear("ffn.up_proj", c["expansion_ratio"] * E, E)
        yield from linear("ffn.down_proj", E, c["expansion_ratio"] * E)

    yield "transformer.wte.weight", (c["vocab_size"], E)
    yield from stack("transformer.blocks", c["n_layers"], layer)
    yield from norm("transformer.norm_f", E)


def bloom(c: Config) -> Tensors:
    """No prefix: the files were saved from the model without its head. Saved again, n_embed is hidden_size."""
    E = c.get("n_embed") or c["hidden_size"]

    def layer(_: int) -> Tensors:
        yield from norm("input_layernorm", E, bias=True)
        yield from norm("post_attention_layernorm", E, bias=True)
        yield from _megatron("self_attention", E, 4 * E, 3 * E, bias=True)

    yield "word_embeddings.weight", (c["vocab_size"], E)
    yield from norm("word_embeddings_layernorm", E, bias=True)
    yield from stack("h", c["n_layer"], layer)
    yield from norm("ln_f", E, bias=True)


def _megatron(mixer: str, hidden: int, inner: int, fused: int, bias: bool) -> Tensors:
    yield from linear(f"{mixer}.query_key_value", fused, hidden, bias)
    yield from linear(f"{mixer}.dense", hidden, hidden, bias)
    yield from linear("mlp.dense_h_to_4h", inner, hidden, bias)
    yield from linear("mlp.dense_4h_to_h", hidden, inner, bias)


def phi(c: Config) -> Tensors:
    E, F, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]

    def layer(_: int) -> Tensors:
        for part in ("q_proj", "k_proj", "v_proj", "dense"):
            yield from linear(f"self_attn.{part}", E, E, bias=True)
        yield from linear("mlp.fc1", F, E, bias=True)
        yield from linear("mlp.fc2", E, F, bias=True)
        yield from norm("input_layernorm", E, bias=True)

    yield "model.embed_tokens.weight", (V, E)
    yield from stack("model.layers", c["num_hidden_layers"], layer)
    yield from norm("model.final_layernorm", E, bias=True)
    yield from linear("lm_head", V, E, bias=True)


def phi3(c: Config) -> Tensors:
    E, F, D = c["hidden_size"], c["intermediate_size"], head_size(c)

    def layer(_: int) -> Tensors:
        yield from linear("self_attn.qkv_proj", (c["num_attention_heads"] + 2 * kv_heads(c)) * D, E)
        yield from linear("self_attn.o_proj", E, c["num_attention_heads"] * D)
        yield from linear("mlp.gate_up_proj", 2 * F, E)
        yield from linear("mlp.down_proj", E, F)
        yield from norm("input_layernorm", E)
        yield from norm("post_attention_layernorm", E)

    yield from llama_like(c, layer, c["num_hidden_layers"])


def gemma2(c: Config, qk_norm: bool = False) -> Tensors:
    E = c["hidden_size"]

    def layer(_: int) -> Tensors:
        yield from attention("self_attn", c)
        if qk_norm:
            yield from norm("self_attn.q_norm", head_size(c))
            yield from norm("self_attn.k_norm", head_size(c))
        yield from swiglu("mlp", c["intermediate_size"], E)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield from norm(f"{name}_layernorm", E)

    yield from llama_like({"vocab_size": 262208, "tie_word_embeddings": True, **c}, layer, c["num_hidden_layers"])


def gemma3(c: Config) -> Tensors:
    return gemma2(c, qk_norm=True)


def qwen(c: Config) -> Tensors:
    E, F = c["hidden_size"], c["intermediate_size"] // 2

    def layer(_: int) -> Tensors:
        yield from norm("ln_1", E)
        yield from linear("attn.c_attn", 3 * E, E, bias=True)
        yield from linear("attn.c_proj", E, E)
        yield from norm("ln_2", E)
        yield from linear("mlp.w1", F, E)
        yield from linear("mlp.w2", F, E)
        yield from linear("mlp.c_proj", E, F)

    yield "transformer.wte.weight", (c["vocab_size"], E)
    yield from stack("transformer.h", c["num_hidden_layers"], layer)
    yield from norm("transformer.ln_f", E)
    yield "lm_head.weight", (c["vocab_size"], E)


def baichuan(c: Config) -> Tensors:
    E = c["hidden_size"]

    def layer(_: int) -> Tensors:
        yield from linear("self_attn.W_pack", 3 * E, E)
        yield from linear("self_attn.o_proj", E, E)
        yield from _swiglu_and_norms(c)

    yield from llama_like(c, layer, c["num_hidden_layers"])


def chatglm(c: Config) -> Tensors:
    """ChatGLM-6B: LayerNorm, biases, 2-D positions."""
    E, F = c["hidden_size"], c["inner_hidden_size"]

    def layer(_: int) -> Tensors:
        yield from norm("input_layernorm", E, bias=True)
        yield from norm("post_attention_layernorm", E, bias=True)
        yield from _megatron("attention", E, F, 3 * E, bias=True)

    yield "transformer.word_embeddings.weight", (c["vocab_size"], E)
    yield from stack("transformer.layers", c["num_layers"], layer)
    yield from norm("transformer.final_layernorm", E, bias=True)


def chatglm2(c: Config) -> Tensors:
    """ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B: RMSNorm, biases on q, k, v only, gate and up in one matrix."""
    E, F, D = c["hidden_size"], c["ffn_hidden_size"], c["kv_channels"]
    H, K = c["num_attention_heads"], c["multi_query_group_num"]

    def layer(_: int) -> Tensors:
        yield from norm("input_layernorm", E)
        yield from linear("self_attention.query_key_value", (H + 2 * K) * D, E, c["add_qkv_bias"])
        yield from linear("self_attention.dense", E, H * D)
        yield from norm("post_attention_layernorm", E)
        yield from linear("mlp.dense_h_to_4h", 2 * F, E)
        yield from linear("mlp.dense_4h_to_h", E, F)

    yield "transformer.embedding.word_embeddings.weight", (c["padded_vocab_size"], E)
    yield from stack("transformer.encoder.layers", c["num_layers"], layer)
    yield from norm("transformer.encoder.final_layernorm", E)
    yield "transformer.output_layer.weight", (c["padded_vocab_size"], E)


def glm(c: Config, sandwich: bool = False) -> Tensors:
    E, F = c["hidden_size"], c["intermediate_size"]
    after = ("post_self_attn_layernorm", "post_mlp_layernorm") if sandwich else ()

    def layer(_: int) -> Tensors:
        yield from attention("self_attn", c, bias=c["attention_bias"])
        yield from linear("mlp.gate_up_proj", 2 * F, E)
        yield from linear("mlp.down_proj", E, F)
        for name in ("input_layernorm", "post_attention_layernorm", *after):
            yield from norm(name, E)

    yield from llama_like(c, layer, c["num_hidden_layers"])


def glm4(c: Config) -> Tensors:
    return glm(c, sandwich=True)


def olmo2(c: Config) -> Tensors:
    """Norms after each half only, and over all of q and of k."""
    E = c["hidden_size"]

    def layer(_: int) -> Tensors:
        yield from attention("self_attn", c)
        yield from norm("self_attn.q_norm", c["num_attention_heads"] * head_size(c))
        yield from norm("self_attn.k_norm", kv_heads(c) * head_size(c))
        yield from swiglu("mlp", c["intermediate_size"], E)
        yield from norm("post_attention_layernorm", E)
        yield from norm("post_feedforward_layernorm", E)

    yield from llama_like(c, layer, c["num_hidden_layers"])


def granite(c: Config) -> Tensors:
    def layer(_: int) -> Tensors:
        yield from attention("self_attn", c)
        yield from _swiglu_and_norms(c)

    yield from llama_like(c, layer, c["num_hidden_layers"])


def cohere(c: Config) -> Tensors:
    """One norm a layer, and with use_qk_norm a norm of its own for each head. The head is tied."""

    def layer(_: int) -> Tensors:
        yield from attention("self_attn", c)
        if c.get("use_qk_norm"):
            yield from norm("self_attn.q_norm", c["num_attention_heads"], head_size(c))
            yield from norm("self_attn.k_norm", kv_heads(c), head_size(c))
        yield from swiglu("mlp", c["intermediate_size"], c["hidden_size"])
        yield from norm("input_layernorm", c["hidden_size"])

    yield from llama_like({**c, "tie_word_embeddings": True}, layer, c["num_hidden_layers"])


def starcoder2(c: Config) -> Tensors:
    E, F, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]

    def layer(_: int) -> Tensors:
        yield from attention("self_attn", c, bias=True, out_bias=True)
        yield from linear("mlp.c_fc", F, E, bias=True)
        yield from linear("mlp.c_proj", E, F, bias=True)
        yield from norm("input_layernorm", E, bias=True)
        yield from norm("post_attention_layernorm", E, bias=True)

    yield "model.embed_tokens.weight", (V, E)
    yield from stack("model.layers", c["num_hidden_layers"], layer)
    yield from norm("model.norm", E, bias=True)
    if not c.get("tie_word_embeddings", True):
        yield "lm_head.weight", (V, E)


def opt(c: Config) -> Tensors:
    """Positions start at row 2. The 350m norms after each half, has no final norm, and projects a smaller table."""
    E, F, small = c["hidden_size"], c["ffn_dim"], c["word_embed_proj_dim"]

    def layer(_: int) -> Tensors:
        for part in ("k", "v", "q", "out"):
            yield from linear(f"self_attn.{part}_proj", E, E, bias=True)
        yield from norm("self_attn_layer_norm", E, bias=True)
        yield from linear("fc1", F, E, bias=True)
        yield from linear("fc2", E, F, bias=True)
        yield from norm("final_layer_norm", E, bias=True)

    def decoder() -> Tensors:
        yield "embed_tokens.weight", (c["vocab_size"], small)
        yield "embed_positions.weight", (c["max_position_embeddings"] + 2, E)
        if small != E:
            yield from linear("project_in", E, small)
            yield from linear("project_out", small, E)
        if c["do_layer_norm_before"]:
            yield from norm("final_layer_norm", E, bias=True)
        yield from stack("layers", c["num_hidden_layers"], layer)

    yield from prefixed("model.decoder.", decoder())


def _swiglu_and_norms(c: Config) -> Tensors:
    yield from swiglu("mlp", c["intermediate_size"], c["hidden_size"])
    yield from norm("input_layernorm", c["hidden_size"])
    yield from norm("post_attention_layernorm", c["hidden_size"])
