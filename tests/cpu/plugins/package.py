"""A plugin package with every kind of part, written into a folder with the record of an installed one."""

from __future__ import annotations

from pathlib import Path

NAME = "every_kind"

PARTS = '''
"""Every kind of part, each on the way of a Llama's step."""
from penstock import formats
from penstock.compiler import pipeline
from penstock.formats import tolerance
from penstock.ir import emit
from penstock.ir.op import op
from penstock.kernels import calls, layouts, registry
from penstock.kernels.tactic import CudaKernel, Draft, KernelUse, Tactic, inputs, outputs, whole_call
from penstock.models import Family, family_of, register

E5M2 = formats.register(formats.Format("fp8_e5m2", 8, "float8_e5m2", "fp8e5", "F8_E5M2", True))
tolerance.register(E5M2, tolerance.Tolerance(0.25, 0.25, 0.1))

llama = family_of({"model_type": "llama"})
register(Family("plugged", ("PluggedForCausalLM",), llama.read, llama.source))


@op(lambda gate, up: gate)
def plugged_glu(gate, up):
    """silu(gate) * up."""
    gate = gate.float()
    return gate * (1 / (1 + (-gate).exp())) * up.float()


def plug(m):
    """glu by silu."""
    if m.node.op != "glu" or m.node.attr("act") != "silu":
        return None
    return {m.node[0]: emit("plugged_glu", *m.node.inputs)[0]}


must = lambda graph: sum(node.op == "glu" for node in graph.nodes)
pipeline.register(pipeline.Pass("plug", (plug,), must=must), after="fold")

layouts.register("every_kind.flipped", layouts.Layout(lambda w: w.flip(0), lambda w: w.flip(0)))


def product(call, given, results, sizes):
    """x @ w.T of a flipped w, in float32."""
    return (given[0].float() @ given[1].flip(0).float().T,)


calls.register("every_kind.product", product)


class Flipped(Tactic):
    op, name = "linear", "flipped"

    def supports(self, site, sizes, device):
        return "a bias" if len(site.inputs) > 2 else "a CPU's" if device.kind != "cpu" else None

    def layouts(self, site, config):
        return {1: "every_kind.flipped"} if 1 in site.weights else {}

    def plan(self, site, sizes, device, config):
        return Draft((whole_call("every_kind.product" if 1 in site.weights else "reference", site),))


class Cuda(Tactic):
    op, name = "plugged_glu", "cuda"

    def supports(self, site, sizes, device):
        return None if device.kind == "cuda" else "needs a CUDA device"

    def plan(self, site, sizes, device, config):
        kernel = CudaKernel("every_kind.parts:plugged", (("gate", "*fp32"), ("up", "*fp32"), ("y", "*fp32")), (), 4)
        return Draft((KernelUse(kernel, (1, 1, 1), (*inputs(0, 1), *outputs(0))),))


registry.register(Flipped())
registry.register(Cuda())
'''
CUDA = """
extern "C" __global__ void plugged(const float* gate, const float* up, float* y) {
    int i = threadIdx.x;
    y[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}
"""


def install(folder: Path, entry: bool = True, version: str = "1.2") -> None:
    """The package, and with `entry` what an installer writes beside it."""
    (folder / NAME).mkdir(parents=True, exist_ok=True)
    (folder / NAME / "__init__.py").write_text("from every_kind import parts\n")
    (folder / NAME / "parts.py").write_text(PARTS)
    (folder / NAME / "parts.cu").write_text(CUDA)
    if entry:
        register(folder, NAME, version)


def register(folder: Path, module: str, version: str = "1.0") -> None:
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[penstock.plugins]\nits_name = {module}\n")
