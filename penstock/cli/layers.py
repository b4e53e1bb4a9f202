"""The layers of a model as people ask for them: `inspect` and `check` say them alike."""

from __future__ import annotations

from collections import Counter
from typing import Any

from penstock.spec import BySlot, FeedForward, Latent, Mixer, Mlp, ModelSpec

Data = dict[str, Any]


def facts(spec: ModelSpec) -> list[Data]:
    """Layers that are alike together, with their count."""
    kinds = Counter((layer.mixer, layer.feedforward) for layer in spec.layers)
    return [{"count": count, **_mixer(mixer), **_feedforward(part)} for (mixer, part), count in kinds.items()]


def _mixer(mixer: Mixer) -> Data:
    if isinstance(mixer, BySlot):
        return {
            "heads": mixer.heads,
            "head_dim": mixer.head_dim,
            "state": "x".join(map(str, mixer.kept[1:])),
            "kernel": mixer.kernel,
        }
    rope = mixer.rope
    own = {"latent": mixer.rank, "rotated": mixer.rope.dim} if isinstance(mixer, Latent) else {}
    bias = None if isinstance(mixer, Latent) else mixer.bias
    return {
        "heads": mixer.heads, "kv_heads": mixer.kv_heads, "head_dim": mixer.head_dim, **own, "window": mixer.window,
        "positions": type(bias).__name__ if bias else "Rope" if rope else None,
        "rope_theta": rope.theta if rope else None,
        "rope_scaling": type(rope.scaling).__name__ if rope and rope.scaling else None,
    }  # fmt: skip


def _feedforward(part: FeedForward | None) -> Data:
    if part is None:
        return {}
    if isinstance(part, Mlp):
        return {"feedforward": part.size, "activation": part.act}
    router = part.router
    experts = {"experts": router.experts, "experts_per_token": router.chosen, "shared": bool(part.shared)}
    return {"feedforward": part.expert.size, "activation": part.expert.act, **experts}


def said(layer: Data) -> str:
    """One of the facts as a line."""
    scaling = f", {layer['rope_scaling']} rope" if layer.get("rope_scaling") else ""
    window = f", window {layer['window']}" if layer.get("window") else ""
    forward = f", feed-forward {_forward(layer)}" if "feedforward" in layer else ""
    return f"{layer['count']} of {_heads(layer)}{window}{scaling}{forward}"


def _heads(layer: Data) -> str:
    if "latent" in layer:
        return f"{layer['heads']} heads over a latent of {layer['latent']} and {layer['rotated']} rotated"
    heads = f"{layer['heads']} heads of {layer['head_dim']}"
    if "state" in layer:
        return f"{heads} with states of {layer['state']}, behind a convolution of {layer['kernel']}"
    return f"{heads} over {layer['kv_heads']} KV heads"


def _forward(layer: Data) -> str:
    width = f"{layer['feedforward']} ({layer['activation']})"
    if not layer.get("experts"):
        return width
    shared = " and a shared one" if layer["shared"] else ""
    return f"{layer['experts_per_token']} of {layer['experts']} experts of {width}{shared}"
