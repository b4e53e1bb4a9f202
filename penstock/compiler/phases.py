"""The phases of a decode step around the model: expanding the upload before it, sampling and committing after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from penstock.engine.profile import Profile
from penstock.engine.program import Call, KernelLaunch, Program
from penstock.errors import BuildError
from penstock.ir.graph import Graph, Value, leaf, tensor
from penstock.ir.op import emit
from penstock.ir.ops.state import PREPARED
from penstock.kernels.tactic import CudaKernel, Kernel

SAMPLING = ("temperature", "top_k", "top_p", "seed", "sample_position")


def prepare_graph(profile: Profile) -> Graph:
    """slots, upload -> everything that the forward pass and sampling read, under the names of PREPARED."""
    node = emit("prepare", _slots(profile), _upload(), **profile.slots.attrs())
    return Graph(node.outputs, PREPARED[: len(node.types)])


def sample_graph(profile: Profile, vocab_size: int) -> Graph:
    """logits and sampling parameters -> "sampled" i32[L], committed to the slots."""
    logits = leaf("input", "logits", tensor("f32", "L", vocab_size))
    kinds = {"temperature": "f32", "top_p": "f32"}
    params = [leaf("input", name, tensor(kinds.get(name, "i32"), "L")) for name in SAMPLING]
    sampled = emit("sample", logits, *params)[0]
    slots = emit("commit", _slots(profile), _upload(), sampled, **profile.slots.attrs())[0]
    return Graph((sampled, slots), ("sampled", "slots"))


def _slots(profile: Profile) -> Value:
    return leaf("state", "slots", tensor("i32", profile.slots.size))


def _upload() -> Value:
    return leaf("input", "upload", tensor("i32", "U"))


def check_prepared(program: Program, kernels: Mapping[str, Kernel]) -> None:
    """Raises BuildError where a launch could read what `prepare` has not written yet: see `Draft`.

    The first launch behind it must let no other start before it has waited; a CUDA kernel launched dependently does.
    """
    for bucket in program.buckets:
        op, launch = next(_behind_prepare(program, bucket), ("", None))
        if not isinstance(launch, KernelLaunch) or not launch.dependent:
            continue
        if isinstance(kernels[launch.kernel], CudaKernel):
            raise BuildError(
                f"bucket {bucket} begins with {launch.kernel} for {op}, which lets others start before it has waited "
                f"for prepare; pin another tactic of {op}"
            )


def _behind_prepare(program: Program, bucket: str) -> Iterator[tuple[str, KernelLaunch | Call]]:
    """(op, launch) of a step in a bucket, in order, from the end of `prepare` on."""
    for phase in program.phases.values():
        for node in phase.graph.nodes:
            if not node.is_leaf and node.op != "prepare":
                yield from ((node.op, launch) for launch in phase.plan(node, bucket).launches)
