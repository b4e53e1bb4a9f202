"""The phases of a decode step around the model: expanding the upload before it, sampling and committing after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from penstock.engine.profile import Profile
from penstock.engine.program import PLAIN, SCORES, Call, KernelLaunch, Program
from penstock.errors import BuildError
from penstock.ir.graph import Graph, Value, leaf, tensor
from penstock.ir.op import emit
from penstock.ir.ops.state import REALS, prepared
from penstock.kernels.tactic import CudaKernel, Kernel

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "sample_position")


def prepare_graph(profile: Profile) -> Graph:
    """slots, upload -> everything that the forward pass and sampling read, under the names of `prepared`."""
    node = emit("prepare", _slots(profile), _upload(), **profile.slots.attrs())
    return Graph(node.outputs, prepared(profile.slots))


def sample_graph(profile: Profile, vocab_size: int) -> Graph:
    """logits and sampling parameters -> "sampled" i32[L], committed to the slots."""
    logits = _by_logit("logits", vocab_size)
    sampled = _sampled(logits)
    return Graph((sampled, _committed(profile, sampled)), ("sampled", "slots"))


def controlled_graph(profile: Profile, vocab_size: int) -> Graph:
    """The same where a row may have penalties, biases or bans, or asks for log-probabilities: a step runs either."""
    logits, slots, attrs = _by_logit("logits", vocab_size), _slots(profile), profile.slots.attrs()
    which = _by_logit("logit_slots"), _by_logit("sample_position")
    adjusted = emit("adjust", logits, slots, *which, **attrs)[0]
    sampled = _sampled(adjusted)
    scores = emit("logprobs", logits, adjusted, sampled, slots, *which, **attrs).outputs
    # Nodes run in the order of the results: what reads the slots goes before what writes them.
    return Graph((sampled, *scores, _committed(profile, sampled)), ("sampled", *SCORES, "slots"))


def _sampled(logits: Value) -> Value:
    return emit("sample", logits, *(_by_logit(name) for name in SAMPLING))[0]


def _committed(profile: Profile, sampled: Value) -> Value:
    return emit("commit", _slots(profile), _upload(), sampled, **profile.slots.attrs())[0]


def _by_logit(name: str, *width: int) -> Value:
    return leaf("input", name, tensor("f32" if width or name in REALS else "i32", "L", *width))


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
    for phase in (program.phases[name] for name in PLAIN if name in program.phases):
        for node in phase.graph.nodes:
            if not node.is_leaf and node.op != "prepare":
                yield from ((node.op, launch) for launch in phase.plan(node, bucket).launches)
