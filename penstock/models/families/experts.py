"""What the families with mixtures of experts share: how their files store experts, and which layers have them."""

from __future__ import annotations

from typing import Any

from penstock.ir import Value, emit, leaf, tensor
from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.spec import FeedForward, Moe, Router

MAX_EXPERTS = 4096  # far beyond any model; each becomes nodes before tensors are compared
TRAINING = ("router_aux_loss_coef", "output_router_logits", "router_jitter_noise")


def read_router(reader: Reader, renormalize: float, **facts: Any) -> Router:
    """softmax over all, then the best, but for `facts`: further fields."""
    for own in ("num_local_experts", "n_routed_experts"):
        reader.spelt(num_experts=own)
    experts, chosen = reader.size("num_experts", most=MAX_EXPERTS), reader.size("num_experts_per_tok")
    reader.ignore(TRAINING)
    if chosen > experts:
        raise reader.refused("num_experts_per_tok", chosen, f"at most {experts}, as many as there are")
    groups, kept = facts.get("groups", 0), facts.get("kept_groups", 0)
    if groups and (experts % groups or kept > groups or chosen > kept * (experts // groups)):
        raise reader.refused("n_group", groups, f"a divisor of {experts}, at least topk_group = {kept}")
    return Router(experts, chosen, renormalize=renormalize, **facts)


def from_experts(wanted: Wanted, prefix: str, gate: str, up: str, down: str) -> Value | None:
    """The experts' arrays where each expert has matrices of its own, `{prefix}.0.{gate}` ...; None for other parts."""
    if not wanted.part.startswith("feedforward.experts."):
        return None
    part = wanted.spec.layers[wanted.layer].feedforward
    assert isinstance(part, Moe)
    rows, columns = part.expert.size, wanted.spec.hidden_size
    names, shape = ((gate, up), (rows, columns)) if ".in." in wanted.part else ((down,), (columns, rows))
    owners = [f"{prefix}.{i}.{name}.weight" for i in range(part.router.experts) for name in names]
    type = tensor(wanted.format, *shape)  # one for all: there are tens of thousands
    below = emit("concat", *(leaf("tensor", owner, type) for owner in owners), dim=0)[0]
    return emit("reshape", below, shape=wanted.shape)[0]


def sparse_layers(reader: Reader, dense: FeedForward, moe: Moe) -> list[FeedForward]:
    """One feed-forward a layer: every `decoder_sparse_step`-th has experts, but for those of `mlp_only_layers`."""
    count, step = common.read_layers(reader), reader.size("decoder_sparse_step", 1)
    only = reader.get("mlp_only_layers", None) or []
    if not isinstance(only, list) or any(type(i) is not int or not 0 <= i < count for i in only):
        raise reader.refused("mlp_only_layers", only, f"a list of layers below {count}")
    return [moe if (i + 1) % step == 0 and i not in only else dense for i in range(count)]
