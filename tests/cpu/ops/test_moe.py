"""route and moe: what Transformers' own modules compute, and rows that depend on no other row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.dbrx import configuration_dbrx, modeling_dbrx
from transformers.models.deepseek_v2 import configuration_deepseek_v2, modeling_deepseek_v2
from transformers.models.deepseek_v3 import configuration_deepseek_v3, modeling_deepseek_v3
from transformers.models.gpt_oss import configuration_gpt_oss, modeling_gpt_oss
from transformers.models.mixtral import configuration_mixtral, modeling_mixtral
from transformers.models.qwen2_moe import configuration_qwen2_moe, modeling_qwen2_moe
from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe

from penstock.errors import GraphError
from penstock.ir.graph import tensor
from penstock.ir.op import get
from penstock.ir.ops.moe import moe, route
from penstock.ir.ops.pointwise import activation

T, E, F, X = 13, 24, 20, 8
QWEN: dict[str, Any] = {"hidden_size": E, "moe_intermediate_size": F, "num_experts": X, "num_experts_per_tok": 3}
DEEPSEEK: dict[str, Any] = {
    "hidden_size": E, "moe_intermediate_size": F, "num_experts_per_tok": 3, "n_routed_experts": X, "n_group": 4,
    "topk_group": 2, "n_shared_experts": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
}  # fmt: skip


def _seeded(module: torch.nn.Module, spread: float = 0.4) -> Any:
    generator = torch.Generator().manual_seed(5)
    for p in (*module.parameters(), *(b for n, b in module.named_buffers() if "bias" in n)):
        p.data = torch.randn(p.shape, generator=generator) * spread
    return module.eval()


def _x() -> Any:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(1))


def _close(ours: Any, theirs: Any) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def _ours(x: Any, router: Any, experts: Any, bias: Any = None, act: str = "silu", **attrs: Any) -> Any:
    chosen, weights = route(x @ router.T, *([] if bias is None else [bias]), **attrs)
    return moe(x, chosen, weights, experts.gate_up_proj, experts.down_proj, act=act)


def test_mixtral() -> None:
    config = configuration_mixtral.MixtralConfig(
        hidden_size=E, intermediate_size=F, num_local_experts=X, num_experts_per_tok=2
    )
    block = _seeded(modeling_mixtral.MixtralSparseMoeBlock(config))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        _close(_ours(_x(), block.gate.weight, block.experts, chosen=2, renormalize=1.0), block(_x()[None])[0])


@pytest.mark.parametrize("normalised", [False, True])
def test_qwen3(normalised: bool) -> None:
    config = configuration_qwen3_moe.Qwen3MoeConfig(**QWEN, norm_topk_prob=normalised)
    block = _seeded(modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config))
    with torch.no_grad():
        ours = _ours(_x(), block.gate.weight, block.experts, chosen=3, renormalize=float(normalised))
        _close(ours, block(_x()[None])[0])


def test_qwen2_without_its_shared_expert() -> None:
    config = configuration_qwen2_moe.Qwen2MoeConfig(**QWEN, norm_topk_prob=False, shared_expert_intermediate_size=F)
    block = _seeded(modeling_qwen2_moe.Qwen2MoeSparseMoeBlock(config))  # type: ignore[no-untyped-call]
    block.shared_expert.down_proj.weight.data.zero_()
    with torch.no_grad():
        _close(_ours(_x(), block.gate.weight, block.experts, chosen=3), block(_x()[None])[0])


@pytest.mark.parametrize("norm", [None, 1.0, 2.0])
def test_dbrx(norm: float | None) -> None:
    ffn: dict[str, Any] = {"hidden_size": E, "ffn_hidden_size": F, "moe_num_experts": X, "moe_top_k": 3}
    config = configuration_dbrx.DbrxConfig(d_model=E, ffn_config={**ffn, "moe_normalize_expert_weights": norm})
    block = _seeded(modeling_dbrx.DbrxFFN(config))  # type: ignore[no-untyped-call]
    mlp = block.experts.mlp
    w_in = torch.cat([w.view(X, F, E) for w in (mlp.w1, mlp.v1)], 1)
    with torch.no_grad():
        chosen, weights = route(_x() @ block.router.layer.weight.T, chosen=3, renormalize=float(norm or 0))
        ours = moe(_x(), chosen, weights, w_in, mlp.w2.view(X, F, E).transpose(1, 2), act="silu")
        theirs = block(_x()[None])
        _close(ours, (theirs[0] if isinstance(theirs, tuple) else theirs).reshape(T, E))


@pytest.mark.parametrize("groups", [0, 4])
def test_deepseek_v2_without_its_shared_expert(groups: int) -> None:
    method = "group_limited_greedy" if groups else "greedy"
    config = configuration_deepseek_v2.DeepseekV2Config(**DEEPSEEK, topk_method=method, routed_scaling_factor=1.5)
    block = _seeded(modeling_deepseek_v2.DeepseekV2Moe(config))
    block.shared_experts.down_proj.weight.data.zero_()
    grouped: dict[str, Any] = {"groups": 4, "kept_groups": 2} if groups else {}
    with torch.no_grad():
        ours = _ours(_x(), block.gate.weight, block.experts, chosen=3, factor=1.5, **grouped)
        _close(ours, block(_x()[None])[0])


def test_deepseek_v3_without_its_shared_expert() -> None:
    config = configuration_deepseek_v3.DeepseekV3Config(**DEEPSEEK, norm_topk_prob=True, routed_scaling_factor=2.5)
    block = _seeded(modeling_deepseek_v3.DeepseekV3MoE(config))
    block.shared_experts.down_proj.weight.data.zero_()
    attrs: dict[str, Any] = {
        "score": "sigmoid",
        "renormalize": 1.0,
        "factor": 2.5,
        "groups": 4,
        "kept_groups": 2,
        "group_top": 2,
    }
    with torch.no_grad():
        bias = block.gate.e_score_correction_bias
        assert bias.abs().max() > 0.1, "the bias decides"
        ours = _ours(_x(), block.gate.weight, block.experts, bias, chosen=3, **attrs)
        _close(ours, block(_x()[None])[0])


def test_gpt_oss() -> None:
    config = configuration_gpt_oss.GptOssConfig(
        hidden_size=E, intermediate_size=F, num_local_experts=X, num_experts_per_tok=3
    )
    block = _seeded(modeling_gpt_oss.GptOssMLP(config), 2.0)  # type: ignore[no-untyped-call]
    e = block.experts
    with torch.no_grad():
        chosen, weights = route(_x() @ block.router.weight.T + block.router.bias, chosen=3, score="top_softmax")
        apart = [torch.cat([w[..., ::2], w[..., 1::2]], -1) for w in (e.gate_up_proj, e.gate_up_proj_bias)]
        ours = moe(
            _x(), chosen, weights, apart[0].transpose(1, 2), e.down_proj.transpose(1, 2), apart[1], e.down_proj_bias,
            act="swiglu_clamped", limit=7.0,
        )  # fmt: skip
        assert (_x() @ e.gate_up_proj[0]).abs().max() > 7, "the limit matters"
        _close(ours, block(_x()[None])[0].reshape(T, E))


def test_grok_1_by_hand() -> None:
    """As its release computes: softmax over all experts, the best two, their weights as they are; gelu by tanh."""
    generator = torch.Generator().manual_seed(2)
    router, w_in, w_out = (torch.randn(s, generator=generator) * 0.3 for s in ((X, E), (X, 2 * F, E), (X, E, F)))
    experts, weights = route(_x() @ router.T, chosen=2)
    ours = moe(_x(), experts, weights, w_in, w_out, act="gelu_tanh")
    for t, x in enumerate(_x()):
        gates = (router @ x).softmax(-1)
        best = gates.argsort(descending=True)[:2]
        parts = (gates[e] * w_out[e] @ (activation(w_in[e, :F] @ x, "gelu_tanh") * (w_in[e, F:] @ x)) for e in best)
        _close(ours[t], sum(parts))


ROUTES: list[dict[str, Any]] = [
    {"chosen": 2, "renormalize": 1.0},
    {"chosen": 3, "renormalize": 2.0, "factor": 0.5},
    {"chosen": 3, "score": "top_softmax"},
    {"chosen": 3, "score": "sigmoid", "renormalize": 1.0, "groups": 4, "kept_groups": 2, "group_top": 2},
    {"chosen": 3, "groups": 2, "kept_groups": 1},
]


@pytest.mark.parametrize("attrs", ROUTES, ids=str)
def test_a_row_depends_on_no_other(attrs: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    x, w_in, w_out = (torch.randn(s, generator=generator) for s in ((37, E), (X, 2 * F, E), (X, E, F)))
    scores = torch.randn(37, X, generator=generator)
    experts, weights = route(scores, **attrs)
    y = moe(x, experts, weights, w_in, w_out, act="silu")
    for part in (slice(0, 1), slice(5, 6), slice(3, 20)):
        some, heavy = route(scores[part], **attrs)
        assert (some == experts[part]).all() and (heavy == weights[part]).all()
        assert (moe(x[part], some, heavy, w_in, w_out, act="silu") == y[part]).all()


@pytest.mark.parametrize("attrs", ROUTES, ids=str)
def test_equal_scores_go_to_the_lower_index(attrs: dict[str, Any]) -> None:
    experts, weights = route(torch.zeros(2, 64 * X), **attrs)
    assert experts.tolist() == [list(range(attrs["chosen"]))] * 2
    assert (weights == weights[0, 0]).all() and weights.isfinite().all()


@pytest.mark.parametrize("attrs", ROUTES, ids=str)
def test_scores_that_are_no_numbers_still_name_experts(attrs: dict[str, Any]) -> None:
    scores = torch.randn(3, X, generator=torch.Generator().manual_seed(4))
    scores[0], scores[1], scores[2, :5] = torch.nan, -torch.inf, torch.inf
    experts, _ = route(scores, **attrs)
    assert all(len(set(row)) == attrs["chosen"] and set(row) <= set(range(X)) for row in experts.tolist())


SCORES = tensor("f32", "T", X)
GOOD = [tensor("bf16", "T", E), tensor("i32", "T", 2), tensor("f32", "T", 2)]
GOOD += [tensor("bf16", X, 2 * F, E), tensor("bf16", X, E, F)]


@pytest.mark.parametrize(
    ("attrs", "says"),
    [
        ({"chosen": 9}, "9 of 8"),
        ({"chosen": 0}, "0 of 8"),
        ({"chosen": 5, "groups": 4, "kept_groups": 2}, "5 of 4"),
        ({"chosen": 2, "groups": 3, "kept_groups": 2}, "do not fit"),
        ({"chosen": 2, "groups": 8, "kept_groups": 4, "group_top": 2}, "do not fit"),
        ({"chosen": 2, "kept_groups": 2}, "without groups"),
        ({"chosen": 2, "score": "tanh"}, "'tanh' is not one of"),
        ({"chosen": 2, "renormalize": 3.0}, "renormalize 3.0"),
    ],
)
def test_a_route_that_makes_no_sense_is_refused(attrs: dict[str, Any], says: str) -> None:
    with pytest.raises(GraphError, match=says):
        get("route").types([SCORES], attrs)


@pytest.mark.parametrize(
    ("change", "attrs", "says"),
    [
        ({3: tensor("bf16", X, F, E)}, {"act": "silu"}, "2F,E"),
        ({4: tensor("bf16", X, E, F + 1)}, {"act": "silu"}, "2F,E"),
        ({2: tensor("f32", "T", 3)}, {"act": "silu"}, "as many experts as weights"),
        ({5: tensor("bf16", X, 2 * F)}, {"act": "silu"}, "both or neither"),
        ({}, {"act": "swish"}, "'swish' is not one of"),
        ({}, {"act": "swiglu_clamped"}, "limit 0.0"),
        ({}, {"act": "silu", "limit": 7.0}, "limit 7.0"),
    ],
)
def test_a_mixture_that_does_not_fit_is_refused(change: dict[int, Any], attrs: dict[str, Any], says: str) -> None:
    types = [change.get(i, t) for i, t in enumerate(GOOD)] + [t for i, t in change.items() if i >= len(GOOD)]
    with pytest.raises(GraphError, match=says):
        get("moe").types(types, attrs)
