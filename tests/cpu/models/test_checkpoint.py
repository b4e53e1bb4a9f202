"""Safetensors directories: single, sharded, and every way in which they come broken."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.errors import CheckpointError
from penstock.models import ignored_tensors, load_config, read_spec, weights
from penstock.models.checkpoint import INDEX, SINGLE, Checkpoint
from tests.cpu.models.twins import save_twin

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_twin("llama", tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_twin("llama", tmp_path, max_shard_size="40KB")
    assert (tmp_path / INDEX).exists() and len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def check(directory: Path, **config: Any) -> None:
    whole = load_config(directory) | config
    spec = read_spec(whole)
    Checkpoint.open(directory).check(weights(spec, whole, "bf16"), ignored_tensors(spec, whole))


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Change, add or (None) remove tensors of a single file; "__" in a name stands for a dot."""
    tensors: dict[str, Any] = load_file(directory / SINGLE)
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({n: t.clone() for n, t in tensors.items() if t is not None}, directory / SINGLE)


def test_sharded_equals_single(single: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("sharded")
    save_twin("llama", other, max_shard_size="40KB")
    check(single)
    check(other)
    one, many = Checkpoint.open(single), Checkpoint.open(other)
    assert {n: (i.shape, i.dtype) for n, i in one.tensors.items()} == {
        n: (i.shape, i.dtype) for n, i in many.tensors.items()
    }
    for name, tensor in load_file(single / SINGLE).items():
        assert torch.equal(one.read(name), tensor) and torch.equal(many.read(name), tensor)


def test_reads_slices_and_converts(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    whole = load_file(single / SINGLE)[Q]
    assert torch.equal(checkpoint.read_slice(Q, 0, 3, 17), whole[3:17])
    assert torch.equal(checkpoint.read_slice(Q, 1, 5, 48), whole[:, 5:48])
    assert torch.equal(checkpoint.read(Q, "bf16"), whole.bfloat16())
    assert torch.equal(checkpoint.read_slice(Q, 0, 0, 2, "f16"), whole[:2].half())
    with pytest.raises(CheckpointError, match="has no tensor 'nothing'; it holds "):
        checkpoint.read("nothing")


def test_a_tensor_is_mapped_not_copied(single: Path) -> None:
    mapped = Checkpoint.open(single).read(Q)
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if SINGLE in line]
    assert any(int(a, 16) <= mapped.data_ptr() < int(b, 16) for a, b in spans)


def test_missing_shard(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {victim.name}, named by {INDEX}"):
        Checkpoint.open(sharded)


def test_index_that_disagrees_or_escapes(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    first = next(iter(index["weight_map"].values()))
    for change, message in [
        ({"extra.weight": first}, "extra.weight not in the shard"),
        ({Q: "../secret.safetensors"}, "'../secret.safetensors', which is not a file beside it"),
    ]:
        (sharded / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(sharded)
    (sharded / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match=r"cannot be read .*weight_map"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated(single: Path, kept: int) -> None:
    data = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(data[:kept])
    with pytest.raises(CheckpointError, match=r"model.safetensors (has|states) .*fetch the file again"):
        Checkpoint.open(single)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{nonsense", "the header is not JSON"),
        (b"[1, 2]", "the header is no JSON object"),
        (b'{"a": {"dtype": "F32"}}', "the header's entry of 'a' is malformed"),
        (b'{"a": 1}', "the header's entry of 'a' is malformed"),
        (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', r"'a' has 8 bytes for F32\[3\]"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "its header says 77: truncated"),
    ],
)
def test_bad_header(header: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_a_pointer_instead_of_the_file(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        Checkpoint.open(tmp_path)


def test_no_safetensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pickled weights only \(pytorch_model.bin\).*safe_serialization"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="is no directory"):
        Checkpoint.open(tmp_path / "pytorch_model.bin")


def test_check_names_what_is_wrong(single: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks model.layers.2.input_layernorm.weight, .* and 4 more"):
        check(single, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"holds model.layers.1.input_layernorm.weight, .* and 4 more, which"):
        check(single, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is F32\[99, 48\], expected .* \[98, 48\]"):
        check(single, vocab_size=98)
    check(single, tie_word_embeddings=True)  # a stored head beside a tied one is excused
    rewrite(single, **{Q.replace(".", "__"): torch.zeros(48, 48, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"q_proj.weight is I8\[48, 48\], expected F32, F16 or BF16"):
        check(single)


def test_old_rotary_buffers_are_excused_and_nothing_like_them(single: Path) -> None:
    name = "model__layers__0__self_attn__rotary_emb__inv_freq"
    rewrite(single, **{name: torch.ones(6)})
    check(single)
    rewrite(single, **{f"{name}_long": torch.ones(6)})
    with pytest.raises(CheckpointError, match=r"holds model.layers.0.self_attn.rotary_emb.inv_freq_long, which"):
        check(single)
