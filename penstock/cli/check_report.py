"""What `penstock check` finds out: plain data, with no tensor read and no torch imported."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from penstock.cli import layers
from penstock.cli.console import amount
from penstock.compiler.backend import Unplanned
from penstock.compiler.build import Frontend, read_model
from penstock.compiler.candidates import candidates
from penstock.compiler.footprint import footprint
from penstock.compiler.options import BuildOptions
from penstock.compiler.select import all_sites
from penstock.engine.device import Device
from penstock.engine.profile import Profile
from penstock.models.binding import shapes
from penstock.models.directory import ModelDirectory
from penstock.models.registry import family_of
from penstock.spec import ModelSpec, Moe

Data = dict[str, Any]


def report(model: Path, options: BuildOptions, device: Device, budget: int) -> Data:
    """Facts and verdict. Raises what a build would for a model that cannot be read, or contradicting limits."""
    front = read_model(model, options, device)
    draft = front.draft
    memory = {**footprint(draft, device), "budget": budget}
    fits = memory["needed"] <= budget
    return {
        "model": _model(front, model),
        "format": draft.format,
        "kv_format": options.kv_format(draft.format, device),
        "device": device.name,
        "profile": draft.profile.to_json(),
        "memory": memory,
        "references": _references(draft, device) if device.kind == "cuda" else {},
        "fits": fits,
        "verdict": _verdict(memory, draft.profile, fits),
    }


def _model(front: Frontend, model: Path) -> Data:
    opened = ModelDirectory.open(model)
    config = opened.config  # of a converted checkpoint too it is the Hugging Face one, which families read
    tensors = front.checkpoint.tensors.values() if front.checkpoint else ()
    return {
        "family": family_of(config).name,
        "architectures": list(config.get("architectures") or ()),
        "parameters": parameters(opened.spec),
        "active_parameters": parameters(opened.spec, of_a_token=True),
        "layers": layers.facts(opened.spec),
        "checkpoint_bytes": sum(info.nbytes for info in tensors),
    }


def parameters(spec: ModelSpec, of_a_token: bool = False) -> int:
    """Numbers that were trained: those of the checkpoint, a tied head once, and none that are computed, as rope's.

    `of_a_token`: of experts only those that one token goes to.
    """
    counts = {name: prod(s) for name, s in shapes(spec).items() if not (spec.tied_head and name == "head.weight")}
    return sum(_met(spec, name, count) if of_a_token else count for name, count in counts.items())


def _met(spec: ModelSpec, name: str, count: int) -> int:
    layer, experts, _ = name.partition(".feedforward.experts.")
    part = spec.layers[int(layer.removeprefix("layers."))].feedforward if experts else None
    return count * part.router.chosen // part.router.experts if isinstance(part, Moe) else count


def _references(draft: Unplanned, device: Device) -> Data:
    """Ops that neither a kernel of ours nor a library runs on this GPU, with the reasons."""
    sizes = draft.profile.sizes(1, 1)
    found: Data = {}
    for site in all_sites(draft.every).values():
        able, refused = candidates(site, sizes, device, {})
        if not any(c.tactic_name != "reference" for c in able):
            found[site.op] = "; ".join(f"{name}: {why}" for name, why in refused.items()) or "no kernel"
    return found


def _verdict(memory: Data, profile: Profile, fits: bool) -> str:
    left = memory["budget"] - memory["needed"]
    if not fits:
        return (
            f"does not fit: {amount(-left)} more are needed; lower max_seq_len or max_num_tokens, "
            f"or use a smaller model"
        )
    room = int(
        (memory["budget"] - memory["weights"] - memory["buffers"] - memory["driver"])
        // max(memory["kv_per_request"], 1)
    )
    if room >= profile.max_batch_size:
        return f"fits: a full batch of {profile.max_batch_size} requests of {profile.max_seq_len} tokens has room"
    return f"fits: {room} requests of full length at once; up to {profile.max_batch_size} while they are shorter"
