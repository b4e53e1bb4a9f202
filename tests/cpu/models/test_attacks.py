"""Configs and safetensors headers made to break their readers: typed errors, and soon."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import CheckpointError, ConfigError
from penstock.models import load_config, read_spec
from penstock.models.checkpoint import INDEX, SINGLE, Checkpoint
from penstock.models.directory import ModelDirectory
from penstock.text.files import MAX_DEPTH, parse_json
from tests.cpu.models.twins import save_twin

DEEP = "[" * 100_000


@pytest.mark.parametrize("text", [DEEP, '{"a": ' * 200 + "1" + "}" * 200, '{"a": ' + "9" * 5000 + "}", "{", b"\xff"])
def test_a_config_that_is_no_reasonable_json(text: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        load_config(tmp_path)


def test_the_limit_of_depth_is_far_from_what_is_published() -> None:
    def nested(depth: int) -> str:
        return "[" * depth + "]" * depth

    assert parse_json(nested(MAX_DEPTH)) and parse_json('{"a": {"b": [1, {"c": null}]}}')
    with pytest.raises(ValueError, match="deeper"):
        parse_json(nested(MAX_DEPTH + 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**7},
        {"vocab_size": 2**31},
        {"hidden_size": 2**40},
        {"intermediate_size": 2**31},
        {"num_attention_heads": 2**31, "num_key_value_heads": 1},
        {"head_dim": 10**6},
        {"num_attention_heads": 2**21, "num_key_value_heads": 1, "head_dim": 4096},
        {"hidden_size": 2**20, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": None},
        {"max_position_embeddings": 2**31},
        {"rms_norm_eps": 10**400},
    ],
)
def test_sizes_beyond_reason_are_refused_at_once(changes: dict[str, Any], tmp_path: Path) -> None:
    save_twin("llama", tmp_path)
    config = load_config(tmp_path) | changes
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=next(iter(changes)) + r" = .*expected .*|num_attention_heads"):
        read_spec(config)
    assert time.monotonic() - begin < 1


def scaled(kind: Any, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama", scaled([1])),
        ("llama", scaled("linear", factor=5e-324)),
        ("llama", scaled("yarn", factor=1e308, original_max_position_embeddings=32)),
        ("llama", scaled("yarn", factor=4.0, original_max_position_embeddings=32, rope_theta=1)),
        ("llama", scaled("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=1e308)),
        ("llama", scaled("longrope", original_max_position_embeddings=1, short_factor=[1.0] * 6,
                         long_factor=[1.0] * 6)),
        ("llama", {"head_dim": 2, **scaled("dynamic", factor=2.0)}),
        ("neox", {"rope_parameters": None, "partial_rotary_factor": 1e308}),
        ("gpt2", {"n_embd": float("nan")}),
        ("gpt2", {"n_layer": float("nan")}),
        ("gemma3", {"sliding_window_pattern": 2**31 - 1}),
        ("mixtral", {"intermediate_size": 2**31 - 1}),
        ("deepseek-v2-greedy", {"v_head_dim": 2**31 - 1}),
        ("granite", {"embedding_multiplier": 1e308}),
        ("granite", {"logits_scaling": 5e-324}),
    ],
)  # fmt: skip
def test_numbers_that_no_model_could_have(case: str, changes: dict[str, Any], tmp_path: Path) -> None:
    save_twin(case, tmp_path)
    with pytest.raises(ConfigError, match=r"is not implemented; expected|at most [\d.e+]+|that a float holds"):
        read_spec(load_config(tmp_path) | changes)


@pytest.mark.parametrize("mapping", [{"tp_size": 10**9, "world_size": 10**9}, {"pp_size": 10**9, "world_size": 10**9}])
def test_ranks_beyond_reason_are_refused_at_once(mapping: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "LlamaForCausalLM", "mapping": mapping}))
    with pytest.raises(ConfigError, match="p_size = 1000000000"):
        ModelDirectory.open(tmp_path)


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    "header",
    [
        DEEP,
        entry(data_offsets=["0", "8"]),
        entry(data_offsets=[0.0, 8.0]),
        entry(data_offsets=[False, 8]),
        entry(data_offsets=[0, 8, 9]),
        entry(data_offsets="08"),
        entry(data_offsets={"0": 1, "1": 2}),
        entry(shape=[2.0]),
        entry(shape=[-2, -1]),
        entry(shape="2"),
        entry(shape=None),
        entry(dtype=5),
        entry(dtype=["F32"]),
        entry(data_offsets=[8, 0]),
        {"a": "text"},
        {"__metadata__": 5, **entry()},
        {"__metadata__": {"format": 5}, **entry()},
        {"__metadata__": None, **entry()},
    ],
)
def test_headers_of_the_wrong_types(header: Any, tmp_path: Path) -> None:
    data = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(data)) + data + bytes(8))
    with pytest.raises(CheckpointError, match=SINGLE):
        Checkpoint.open(tmp_path)


def test_what_only_the_library_refuses_is_ours_too(tmp_path: Path) -> None:
    """A gap between two tensors, and a type that nobody knows."""
    for broken in (entry(data_offsets=[0, 8]) | {"b": entry(data_offsets=[16, 24])["a"]}, entry(dtype="F99")):
        data = json.dumps(broken).encode()
        size = max(e["data_offsets"][1] for e in broken.values())
        (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(data)) + data + bytes(size))
        with pytest.raises(CheckpointError, match="cannot be mapped"):
            Checkpoint.open(tmp_path).read("a")


def test_a_deep_index(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(DEEP)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint.open(tmp_path)


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    save_twin("llama", tmp_path / "plain")
    (tmp_path / "plain").rename(directory)
    with pytest.raises(CheckpointError, match="no path of UTF-8"):
        ModelDirectory.open(directory).checkpoint()
