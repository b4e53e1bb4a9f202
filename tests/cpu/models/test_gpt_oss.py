"""gpt-oss as it was published: experts in MXFP4, packed here by hand, against Transformers with the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
from penstock.engine import store
from penstock.errors import CheckpointError, ConfigError
from penstock.ir.ops.weight import mxfp4
from penstock.models import load_config, random_binding, read_spec, stored_format, weights
from penstock.models.directory import ModelDirectory
from penstock.runtime.step import CpuBackend
from tests.cpu.engines.driven import LIMITS, assert_same, generated, prompts_of, speak
from tests.cpu.models.twins import save_twin

PACKED = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"
    ],
    "quant_method": "mxfp4",
}  # fmt: skip


def number(code: int) -> float:
    """Of four bits: a sign, two of exponent with bias 1, one of fraction."""
    exponent, fraction = code >> 1 & 3, code & 1
    size = 2.0 ** (exponent - 1) * (1 + fraction / 2) if exponent else fraction / 2
    return -size if code & 8 else size


NUMBERS = torch.tensor([number(code) for code in range(16)])


def packed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[..., 32 G] -> blocks u8[..., G, 16], scales u8[..., G], and the numbers that they stand for."""
    groups = x.unflatten(-1, (-1, 32))
    exponent = (groups.abs().amax(-1, keepdim=True) / 6).log2().ceil()
    codes = (groups / 2**exponent)[..., None].sub(NUMBERS).abs().argmin(-1)
    blocks = codes[..., 0::2] + 16 * codes[..., 1::2]
    meant = (NUMBERS[codes] * 2**exponent).flatten(-2)
    return blocks.to(torch.uint8), (exponent[..., 0] + 127).to(torch.uint8), meant


def pack_twin(case: str, directory: Path) -> Any:
    """The case's twin with its experts rounded to what 4 bits can say, and saved as blocks and scales."""
    model = save_twin(case, directory, {"max_position_embeddings": 256})
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales, meant = packed(tensors.pop(name).transpose(-1, -2))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        with torch.no_grad():
            model.get_parameter(name).copy_(meant.transpose(-1, -2))
    save_file(tensors, directory / "model.safetensors")
    config = load_config(directory)
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": PACKED}))
    return model


def test_every_code_and_scale() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 1, 16)
    scales = torch.tensor([[0], [1], [100], [126], [127], [128], [200], [252], *[[127]] * 8], dtype=torch.uint8)
    codes = [(i & 15, i >> 4) for i in range(256)]
    want = torch.tensor([[number(a), number(b)] for a, b in codes], dtype=torch.float64).view(16, 32)
    got = mxfp4(blocks, scales, format="bf16")
    assert torch.equal(got.double(), want * 2.0 ** (scales.double() - 127))
    assert mxfp4(blocks[:1], torch.full((1, 1), 255, dtype=torch.uint8), format="bf16").isnan().all()


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("packed") / "hf"
    return pack_twin("gpt-oss", directory), directory


def test_a_packed_checkpoint_is_the_model_it_stands_for(twin: tuple[Any, Path], tmp_path: Path) -> None:
    model, directory = twin
    options = BuildOptions(device="cpu", dtype="float32", cache_dir=tmp_path / "cache", **LIMITS)  # type: ignore[arg-type]
    path = build(directory, options, tmp_path / "engine")
    engine = store.load(path)
    for ours in speak(engine, CpuBackend(engine, path), prompts_of((3, 65)), 32):
        assert_same(ours, generated(model, ours.prompt, 32))


def test_its_format_is_what_it_unpacks_to(twin: tuple[Any, Path]) -> None:
    config = load_config(twin[1])
    assert stored_format({k: v for k, v in config.items() if k != "dtype"}) == "bf16"


def test_random_weights_are_no_random_bytes(twin: tuple[Any, Path]) -> None:
    config = load_config(twin[1])
    binding = weights(read_spec(config), config, "f32")
    made = random_binding(binding)["layers.0.feedforward.experts.in.weight"]
    names, nodes = set(), [made.node]
    while nodes:
        node = nodes.pop()
        names.add(node.op)
        nodes += [value.node for value in node.inputs]
    assert "random" in names and not {"mxfp4", "tensor"} & names and made.type.format.name == "f32"


def test_what_is_stored_otherwise_is_refused(twin: tuple[Any, Path], tmp_path: Path) -> None:
    directory = tmp_path / "hf"
    directory.mkdir()
    config = (twin[1] / "config.json").read_text()
    (directory / "config.json").write_text(config)
    tensors = load_file(twin[1] / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    save_file({**tensors, name: tensors[name].float()}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj_scales is F32\[5, 64, 1\], expected U8 of \[5, 64, 1\]"):
        ModelDirectory.open(directory).checkpoint()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quant_method": "fp8"}, "quant_method = 'fp8'"),
        ({"modules_to_not_convert": ["model.layers.0.mlp.experts"]}, "modules_to_not_convert"),
        ({"block_size": 32}, "unknown key block_size"),
    ],
)
def test_another_packing_is_refused(changes: dict[str, Any], said: str, twin: tuple[Any, Path]) -> None:
    config = load_config(twin[1])
    with pytest.raises(ConfigError, match=said):
        read_spec({**config, "quantization_config": {**PACKED, **changes}})
