"""What a model will take of a device, from its graphs alone: before anything is timed, compiled or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.compiler.backend import Unplanned
from penstock.compiler.memory import plan_memory
from penstock.engine.device import Device
from penstock.engine.groups import groups_of
from penstock.engine.memory import CONTEXT, LIBRARY, LIBRARY_CODE, bucket_keys, gib, graph_bytes
from penstock.engine.program import Phase, Plan, Site, Sizes
from penstock.errors import ResourceError
from penstock.ir.graph import Graph

BINARIES = 100  # loaded kernels of an engine, about
NO_PLAN = Plan("", ())


def footprint(draft: Unplanned, device: Device) -> dict[str, Any]:
    """Bytes. `needed`: for one request of full length, and on a GPU with what the driver and the library take.

    Kernels' own workspace is not known yet, and what selection will choose from the library neither.
    """
    profile, kv = draft.profile, draft.work["kv_bytes_per_token"]
    groups = groups_of(draft.graphs["forward"].leaves("state"))
    weights = sum({n.name: n.types[0].nbytes() for graph in draft.every for n in graph.leaves("weight")}.values())
    buffers = _buffers(draft) + 4 * (profile.slots.size + profile.upload_size)
    request = sum(g.request_bytes(profile.max_seq_len, profile.block_size, profile.max_num_tokens) for g in groups)
    driver = _driver(draft) if device.kind == "cuda" else 0
    fixed, block = weights + buffers + driver, sum(g.unit_bytes for g in groups if not g.by_slot)
    return {
        "weights": weights,
        "buffers": buffers,
        "driver": driver,
        "kv_per_token": kv,
        "kv_per_request": request,
        "needed": fixed + request + block,  # and the block that padding writes to
        "at_limits": fixed + request * profile.max_batch_size,
    }


def require_room(draft: Unplanned, device: Device) -> None:
    """Raises ResourceError for an engine that could not even run one request on this GPU, saying what to lower."""
    found = footprint(draft, device)
    if device.kind != "cuda" or found["needed"] <= device.memory_bytes:
        return
    profile = draft.profile
    raise ResourceError(
        f"an engine of this model needs {gib(found['needed'])} (weights {gib(found['weights'])}, buffers of "
        f"max_num_tokens={profile.max_num_tokens} {gib(found['buffers'])}, one request of "
        f"max_seq_len={profile.max_seq_len} {gib(found['kv_per_request'])}, the driver {gib(found['driver'])}) and "
        f"{device.name} has {gib(device.memory_bytes)}; {_remedy(found, device)}"
    )


def _remedy(found: dict[str, Any], device: Device) -> str:
    if found["weights"] + found["driver"] > device.memory_bytes:
        return "its weights alone do not fit: use a smaller model"
    return "lower max_seq_len or max_num_tokens"


def _driver(draft: Unplanned) -> int:
    """The context, captured graphs, and the library, should it be chosen for anything."""
    launches = sum(not node.is_leaf for graph in draft.every for node in graph.nodes)
    return CONTEXT + LIBRARY + LIBRARY_CODE + graph_bytes(len(bucket_keys(draft.profile)), launches, BINARIES)


def _buffers(draft: Unplanned) -> int:
    """The arena of the largest bucket, as the memory plan lays it out with no workspace; programs share it."""
    tokens = draft.profile.max_num_tokens
    sizes = draft.profile.sizes(tokens, draft.profile.logit_buckets(tokens)[-1])
    return max(_top(graphs, sizes) for graphs in draft.programs.values())


def _top(graphs: Mapping[str, Graph], sizes: Sizes) -> int:
    phases = {
        name: Phase(graph, {Site.of(n).key: {"": NO_PLAN} for n in graph.nodes if not n.is_leaf})
        for name, graph in graphs.items()
    }
    return plan_memory(phases, sizes, "")[1]
