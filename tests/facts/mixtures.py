"""Weights of the published models that mix experts, compress their KV, or keep a state that is no cache; see `dense`.

Also what quantised files hold in place of weights: DeepSeek-V3's scales, gpt-oss's blocks of 4-bit numbers.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.facts.shapes import Config, Tensors, attention, head_size, linear, llama_like, norm, stack, swiglu


def mixtral(c: Config) -> Tensors:
    E, F = c["hidden_size"], c["intermediate_size"]

    def expert(_: int) -> Tensors:
        yield from linear("w1", F, E)
        yield from linear("w2", E, F)
        yield from linear("w3", F, E)

    def layer(_: int) -> Tensors:
        yield from attention("self_attn", c)
        yield from linear("block_sparse_moe.gate", c["num_local_experts"], E)
        yield from stack("block_sparse_moe.experts", c["num_local_experts"], expert)
        yield from _two_norms(E)

    yield from llama_like(c, layer, c["num_hidden_layers"])


def dbrx(c: Config) -> Tensors:
    """All experts of a layer in one matrix: rows X x F; w2 is stored like w1, [in, out]. Norms have no bias."""
    E, kv, moe = c["d_model"], c["attn_config"]["kv_n_heads"] * (c["d_model"] // c["n_heads"]), c["ffn_config"]
    rows = moe["moe_num_experts"] * moe["ffn_hidden_size"]

    def layer(_: int) -> Tensors:
        yield from linear("norm_attn_norm.attn.Wqkv", E + 2 * kv, E)
        yield from linear("norm_attn_norm.attn.out_proj", E, E)
        yield from norm("norm_attn_norm.norm_1", E)
        yield from norm("norm_attn_norm.norm_2", E)
        yield from linear("ffn.router.layer", moe["moe_num_experts"], E)
        for part in ("w1", "v1", "w2"):
            yield f"ffn.experts.mlp.{part}", (rows, E)

    yield "transformer.wte.weight", (c["vocab_size"], E)
    yield from stack("transformer.blocks", c["n_layers"], layer)
    yield from norm("transformer.norm_f", E)
    yield "lm_head.weight", (c["vocab_size"], E)


def grok1(c: Config) -> Tensors:
    """Four norms a layer, called scale; `linear` is the activated half, `linear_v` the other, `linear_1` goes down."""
    E, F = c["hidden_size"], c["intermediate_size"]

    def expert(_: int) -> Tensors:
        yield from linear("linear", F, E)
        yield from linear("linear_1", E, F)
        yield from linear("linear_v", F, E)

    def layer(_: int) -> Tensors:
        yield from attention("attn", c)
        yield from linear("moe_block.gate", c["num_experts"], E)
        yield from stack("moe_block.experts", c["num_experts"], expert)
        for name in ("pre_attn", "post_attn", "pre_moe", "post_moe"):
            yield f"{name}_norm.scale", (E,)

    yield "model.embed_tokens.weight", (c["vocab_size"], E)
    yield from stack("model.layers", c["num_hidden_layers"], layer)
    yield "model.norm.scale", (E,)


def qwen2_moe(c: Config) -> Tensors:
    def layer(_: int) -> Tensors:
        yield from attention("self_attn", c, bias=True)
        yield from _qwen_experts(c)
        yield from _two_norms(c["hidden_size"])

    yield from llama_like(c, layer, c["num_hidden_layers"])


def qwen3_moe(c: Config) -> Tensors:
    def layer(_: int) -> Tensors:
        yield from attention("self_attn", c)
        yield from norm("self_attn.q_norm", head_size(c))
        yield from norm("self_attn.k_norm", head_size(c))
        yield from _qwen_experts(c)
        yield from _two_norms(c["hidden_size"])

    yield from llama_like(c, layer, c["num_hidden_layers"])


def qwen3_next(c: Config) -> Tensors:
    """Every fourth layer attends, with a gate on its output; the others keep a state (gated delta net)."""
    yield from llama_like(c, lambda i: _next_layer(c, i), c["num_hidden_layers"])


def _next_layer(c: Config, i: int) -> Tensors:
    attends = (i + 1) % c["full_attention_interval"] == 0
    yield from _gated_attention(c) if attends else _delta_net(c)
    yield from _qwen_experts(c)
    yield from _two_norms(c["hidden_size"])


def qwen3_next_mtp(c: Config) -> Tensors:
    """The layer that predicts one token more."""
    E = c["hidden_size"]
    yield from linear("mtp.fc", E, 2 * E)
    yield from stack("mtp.layers", 1, lambda _: _next_layer(c, c["full_attention_interval"] - 1))
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield from norm(f"mtp.{name}", E)


def _gated_attention(c: Config) -> Tensors:
    E, D, H, kv = c["hidden_size"], c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"] * c["head_dim"]
    for part, rows in (("q", 2 * H * D), ("k", kv), ("v", kv)):
        yield from linear(f"self_attn.{part}_proj", rows, E)
    yield from linear("self_attn.o_proj", E, H * D)
    yield from norm("self_attn.q_norm", D)
    yield from norm("self_attn.k_norm", D)


def _delta_net(c: Config) -> Tensors:
    E, keys = c["hidden_size"], c["linear_num_key_heads"] * c["linear_key_head_dim"]
    heads, size = c["linear_num_value_heads"], c["linear_value_head_dim"]
    yield "linear_attn.A_log", (heads,)
    yield "linear_attn.conv1d.weight", (2 * keys + heads * size, 1, c["linear_conv_kernel_dim"])
    yield "linear_attn.dt_bias", (heads,)
    yield from linear("linear_attn.in_proj_ba", 2 * heads, E)
    yield from linear("linear_attn.in_proj_qkvz", 2 * keys + 2 * heads * size, E)
    yield from norm("linear_attn.norm", size)
    yield from linear("linear_attn.out_proj", E, heads * size)


def _qwen_experts(c: Config) -> Tensors:
    E, shared = c["hidden_size"], c.get("shared_expert_intermediate_size")
    yield from linear("mlp.gate", c["num_experts"], E)
    for x in range(c["num_experts"]):
        yield from swiglu(f"mlp.experts.{x}", c["moe_intermediate_size"], E)
    if shared:
        yield from swiglu("mlp.shared_expert", shared, E)
        yield from linear("mlp.shared_expert_gate", 1, E)


def gpt_oss(c: Config) -> Tensors:
    """Attention, router and biases; the experts are blocks in the files: `gpt_oss_experts`, `gpt_oss_blocks`."""
    E = c["hidden_size"]

    def layer(_: int) -> Tensors:
        yield from attention("self_attn", c, bias=True, out_bias=True)
        yield "self_attn.sinks", (c["num_attention_heads"],)
        yield from linear("mlp.router", c["num_local_experts"], E, bias=True)
        yield "mlp.experts.gate_up_proj_bias", (c["num_local_experts"], 2 * c["intermediate_size"])
        yield "mlp.experts.down_proj_bias", (c["num_local_experts"], E)
        yield from _two_norms(E)

    yield from llama_like(c, layer, c["num_hidden_layers"])


def gpt_oss_experts(c: Config) -> Tensors:
    """The weights that the blocks stand for, [out, in]; gate and up rows alternate."""
    X, E, F = c["num_local_experts"], c["hidden_size"], c["intermediate_size"]

    def layer(_: int) -> Tensors:
        yield "gate_up_proj", (X, 2 * F, E)
        yield "down_proj", (X, E, F)

    yield from stack("model.layers", c["num_hidden_layers"], layer)


def gpt_oss_blocks(c: Config) -> Tensors:
    """MXFP4: 32 numbers in 16 bytes, and a byte of exponent for them."""
    X, E, F = c["num_local_experts"], c["hidden_size"], c["intermediate_size"]

    def layer(_: int) -> Tensors:
        for name, rows, columns in (("gate_up", 2 * F, E), ("down", E, F)):
            yield f"mlp.experts.{name}_proj_blocks", (X, rows, columns // 32, 16)
            yield f"mlp.experts.{name}_proj_scales", (X, rows, columns // 32)

    yield from stack("model.layers", c["num_hidden_layers"], layer)


def deepseek(c: Config) -> Tensors:
    yield from llama_like(c, lambda i: _deepseek_layer(c, i), c["num_hidden_layers"])


def _deepseek_layer(c: Config, i: int) -> Tensors:
    E = c["hidden_size"]
    yield from _latent_attention(c)
    if i < c["first_k_dense_replace"]:
        yield from swiglu("mlp", c["intermediate_size"], E)
    else:
        yield from _deepseek_experts(c)
    yield from _two_norms(E)


def _latent_attention(c: Config) -> Tensors:
    E, H, rank, rope = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    query = H * (c["qk_nope_head_dim"] + rope)
    if c["q_lora_rank"]:
        yield from linear("self_attn.q_a_proj", c["q_lora_rank"], E)
        yield from norm("self_attn.q_a_layernorm", c["q_lora_rank"])
        yield from linear("self_attn.q_b_proj", query, c["q_lora_rank"])
    else:
        yield from linear("self_attn.q_proj", query, E)
    yield from linear("self_attn.kv_a_proj_with_mqa", rank + rope, E)
    yield from norm("self_attn.kv_a_layernorm", rank)
    yield from linear("self_attn.kv_b_proj", H * (c["qk_nope_head_dim"] + c["v_head_dim"]), rank)
    yield from linear("self_attn.o_proj", E, H * c["v_head_dim"])


def _deepseek_experts(c: Config) -> Tensors:
    E, F = c["hidden_size"], c["moe_intermediate_size"]
    yield from linear("mlp.gate", c["n_routed_experts"], E)
    if c["topk_method"] == "noaux_tc":
        yield "mlp.gate.e_score_correction_bias", (c["n_routed_experts"],)
    for x in range(c["n_routed_experts"]):
        yield from swiglu(f"mlp.experts.{x}", F, E)
    yield from swiglu("mlp.shared_experts", F * c["n_shared_experts"], E)


def deepseek_mtp(c: Config) -> Tensors:
    """The layer that predicts one token more, numbered after the last, with copies of table and head."""
    E, last = c["hidden_size"], c["num_hidden_layers"]
    yield from ((f"model.layers.{last}.{name}", shape) for name, shape in _deepseek_layer(c, last))
    yield f"model.layers.{last}.embed_tokens.weight", (c["vocab_size"], E)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        yield from norm(f"model.layers.{last}.{name}", E)
    yield from linear(f"model.layers.{last}.eh_proj", E, 2 * E)
    yield f"model.layers.{last}.shared_head.head.weight", (c["vocab_size"], E)


def deepseek_scales(c: Config, weights: Callable[[Config], Tensors]) -> Tensors:
    """One float32 for each block of 128 x 128 of a matrix in fp8; table, head, router and eh_proj are in bfloat16."""
    plain = ("embed_tokens", "head.weight", "mlp.gate.weight", "eh_proj")
    for name, shape in weights(c):
        if len(shape) == 2 and not any(word in name for word in plain):
            yield f"{name}_scale_inv", (-(-shape[0] // 128), -(-shape[1] // 128))


def mamba2(c: Config) -> Tensors:
    E, heads, inner = c["hidden_size"], c["num_heads"], c["expand"] * c["hidden_size"]
    conv = inner + 2 * c["n_groups"] * c["state_size"]

    def layer(_: int) -> Tensors:
        yield from norm("norm", E)
        for name in ("dt_bias", "A_log", "D"):
            yield f"mixer.{name}", (heads,)
        yield "mixer.conv1d.weight", (conv, 1, c["conv_kernel"])
        yield "mixer.conv1d.bias", (conv,)
        yield from linear("mixer.in_proj", inner + conv + heads, E)
        yield from norm("mixer.norm", inner)
        yield from linear("mixer.out_proj", E, inner)

    yield "backbone.embeddings.weight", (c["vocab_size"], E)
    yield from stack("backbone.layers", c["num_hidden_layers"], layer)
    yield from norm("backbone.norm_f", E)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], E)


def _two_norms(hidden: int) -> Tensors:
    yield from norm("input_layernorm", hidden)
    yield from norm("post_attention_layernorm", hidden)
