"""Gemma 2 and 3, Phi-3, OLMo 2, Granite, Command-R, GLM, Qwen 1, Baichuan: what their configs say and what is refused.

The twins prove the mathematics; here are spellings, and facts that no twin of a single form would miss.
"""

from __future__ import annotations

from typing import Any

import pytest

from penstock.compiler import pipeline
from penstock.errors import ConfigError
from penstock.models import build_forward, read_spec, weights
from penstock.spec import Alibi, Linear, LongRope, ModelSpec, Rope
from tests.cpu.models.cases.remote import CASES as REMOTE

_SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_PHI3_LONG: dict[str, Any] = {
    "original_max_position_embeddings": 32,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
}


def read(model_type: str, **more: Any) -> ModelSpec:
    own = REMOTE[model_type][1] if model_type in REMOTE else {**_SIZES, "model_type": model_type}
    own = {"model_type": model_type} if "text_config" in more else own
    return read_spec({k: v for k, v in (own | more).items() if v != "absent"})


def windows(spec: ModelSpec) -> list[int]:
    return [layer.mixer.window for layer in spec.layers]


def test_gemma_2_sees_a_window_in_every_other_layer_and_gemma_3_in_five_of_six() -> None:
    assert windows(read("gemma2", sliding_window=9)) == [9, 0] * 4
    assert windows(read("gemma2", sliding_window=9, sliding_window_size=9)) == [9, 0] * 4
    assert windows(read("gemma3_text", sliding_window=9)) == [9] * 5 + [0] + [9] * 2
    assert windows(read("gemma3_text", sliding_window=9, sliding_window_pattern=2)) == [9, 0] * 4
    types = (["sliding_attention"] * 3 + ["full_attention"]) * 2
    assert windows(read("gemma3_text", sliding_window=9, layer_types=types)) == ([9] * 3 + [0]) * 2


def test_caps_of_gemma_are_absent_only_where_null_says_so() -> None:
    assert (read("gemma2").layers[0].mixer.softcap, read("gemma2").logit_softcap) == (50.0, 30.0)
    off = read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (off.layers[0].mixer.softcap, off.logit_softcap) == (0.0, 0.0)
    assert (read("gemma3_text").layers[0].mixer.softcap, read("gemma3_text").logit_softcap) == (0.0, 0.0)
    assert read("gemma2", query_pre_attn_scalar=144).layers[0].mixer.scale == 144**-0.5


def test_both_spellings_of_gemma_3s_two_ropes() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    new = {
        "full_attention": {**scaling, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
    }
    old = read("gemma3_text", rope_theta=1e6, rope_local_base_freq=20000.0, rope_scaling=scaling)
    assert old == read("gemma3_text", rope_parameters=new)
    assert old.layers[5].mixer.rope == Rope(1e6, 256, Linear(8.0)) and old.layers[0].mixer.rope == Rope(20000.0, 256)
    plain = read("gemma3_text")
    assert (plain.layers[5].mixer.rope, plain.layers[0].mixer.rope) == (Rope(1e6, 256), Rope(1e4, 256))


def test_phi_3_by_its_first_word_for_longrope() -> None:
    rope = read("phi3", **_PHI3_LONG).layers[0].mixer.rope
    assert rope == Rope(10000.0, 12, LongRope(2.0, 32, (1.0,) * 6, (2.0,) * 6))
    assert windows(read("phi3", sliding_window=9)) == [9] * 8 and windows(read("phi3")) == [0] * 8


def test_every_fourth_layer_of_command_r7b_knows_no_positions_and_sees_all() -> None:
    published = {
        "layer_switch": 4, "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0, "use_gated_activation": True, "use_parallel_block": True, "use_embedding_sharing": True,
        "use_parallel_embedding": True, "cache_implementation": "hybrid", "head_dim": 12, "rope_theta": 50000,
    }  # fmt: skip
    spec = read("cohere2", sliding_window=9, **published)
    assert windows(spec) == [9, 9, 9, 0] * 2
    assert [layer.mixer.rope for layer in spec.layers[2:4]] == [Rope(50000.0, 12, interleaved=True), None]


def test_multipliers_of_granite_and_lengths_of_command_r() -> None:
    multipliers = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0078125}
    spec = read("granite", logits_scaling=16.0, **multipliers)
    assert (spec.embedding_scale, spec.layers[0].residual_scale, spec.logit_scale) == (12.0, 0.22, 0.0625)
    assert spec.layers[0].mixer.scale == 0.0078125
    assert read("cohere", model_max_length=131072).max_position == 131072
    assert read("cohere").layers[0].mixer.rope == Rope(500000.0, 12, interleaved=True)


def test_qwen_1_ends_where_its_length_dependent_attention_would_begin() -> None:
    assert read("qwen").max_position == 256 and read("qwen", use_dynamic_ntk=False).max_position == 256
    assert read("qwen", use_dynamic_ntk=False, use_logn_attn=False).max_position == 512


def test_baichuan_13b_is_the_one_without_max_position_embeddings() -> None:
    assert (
        isinstance(read("baichuan-13b").layers[0].mixer.bias, Alibi) and not read("baichuan-13b").layers[0].mixer.rope
    )
    both = read("baichuan-7b", model_max_length=4096)
    assert both.layers[0].mixer.rope == Rope(10000.0, 12) and not both.layers[0].mixer.bias


@pytest.mark.parametrize("case", ["phi3", "glm4", "qwen", "baichuan-7b", "baichuan2-13b", "chatglm"])
def test_what_is_stored_as_one_is_multiplied_as_one(case: str) -> None:
    config = REMOTE[case][1] if case in REMOTE else {**_SIZES, "model_type": case}
    spec = read_spec(config)
    graph, _ = pipeline.run(build_forward(spec, weights(spec, config, "bf16"), "bf16", 4))
    fused = [node for node in graph.nodes if node.op == "concat" or node.op == "slice"]
    left = {leaf.node.name.split(".", 3)[-1] for node in fused for leaf in node.inputs if leaf.node.op == "tensor"}
    apart = {"glm4": ("self_attn.",), "qwen": ("mlp.w",), "baichuan-7b": ("mlp.",), "baichuan2-13b": ("mlp.",)}
    assert all(name.startswith(apart.get(case, ())) for name in left), left


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma2", {"sliding_window": None}, "sliding_window = None"),
    ("gemma2", {"sliding_window": 9, "sliding_window_size": 8}, "sliding_window_size = 8"),
    ("gemma2", {"layer_types": ["chunked_attention"] * 8}, "layer_types = "),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma2", {"sliding_window_pattern": 3}, "unknown key sliding_window_pattern = 3"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "ntk"}}}, "rope_type = 'ntk'"),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"a": 1}}}, "full_attention: unknown key a = 1"),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "default"}, "b": {}}}, "unknown key b"),
    ("gemma3", {"text_config": {"model_type": "gemma3_text", "odd": 1}}, "text_config: unknown key odd = 1"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = .*longrope"),
    ("phi3", _PHI3_LONG | {"original_max_position_embeddings": "absent"}, "original_max_position_embeddings"),
    ("phi3", {"attention_bias": True}, "attention_bias = True"),
    ("phi3", {"partial_rotary_factor": 0.6}, "partial_rotary_factor = 0.6"),
    ("olmo2", {"rope_parameters": {"rope_type": "mrope"}}, "rope_type = 'mrope'"),
    ("olmo2", {"clip_qkv": 8.0}, "unknown key clip_qkv = 8.0"),
    ("granite", {"residual_multiplier": 0}, "residual_multiplier = 0"),
    ("cohere2", {"order_of_interleaved_layers": "global_attn_first"}, "order_of_interleaved_layers"),
    ("cohere2", {"use_parallel_block": False}, "use_parallel_block = False"),
    ("glm", {"head_dim": 12, "partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25"),
    ("qwen", {"rotary_pct": 0.5}, "rotary_pct = 0.5"),
    ("qwen", {"use_cache_quantization": True}, "use_cache_quantization = True"),
    ("qwen", {"kv_channels": 8}, "kv_channels = 8"),
    ("qwen", {"intermediate_size": 161}, "intermediate_size = 161 .*even"),
    ("baichuan-7b", {"vocab_size": 64001}, "vocab_size = 64001 .*64000 .Baichuan 1. or 125696"),
    ("baichuan-7b", {"hidden_size": 5120}, "max_position_embeddings = 256"),
    ("baichuan-13b", {"hidden_size": 4096}, "max_position_embeddings = None"),
    ("baichuan-13b", {"model_max_length": "absent"}, "no key 'max_position_embeddings'"),
    ("chatglm", {"quantization_bit": 4}, "quantization_bit = 4"),
    ("chatglm", {"pre_seq_len": 128}, "pre_seq_len = 128"),
    ("chatglm", {"rmsnorm": False}, "rmsnorm = False"),
    ("chatglm", {"padded_vocab_size": 65024, "rope_ratio": 16}, "rope_ratio = 16.0 .*ChatGLM3-6B-32K"),
    ("chatglm", {"multi_query_group_num": 3}, "multi_query_group_num = 3"),
]


@pytest.mark.parametrize(("case", "changes", "message"), REFUSED)
def test_refused_by_name(case: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(case, **changes)
