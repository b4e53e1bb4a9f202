"""The closed world of config.json: what is read, what is excused, and that all else is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock import plugins
from penstock.errors import ConfigError, ModelError, UnsupportedArchitectureError
from penstock.models import Family, family_of, load_config, read_spec, register, registry, stored_format
from penstock.spec import Linear, LongRope, ModelSpec, Yarn
from tests.facts.tensors import published_config

LLAMA = published_config("Llama-3.1-8B")
QWEN2 = published_config("Qwen2-7B")
GEMMA = published_config("gemma-2b")
LLAMA2 = published_config("Llama-2-7b-hf")


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in keys}


def scaled(**scaling: Any) -> dict[str, Any]:
    return {**LLAMA2, "rope_scaling": scaling}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (LLAMA | {"use_parallel_residual": False}, "unknown key use_parallel_residual = False"),
    (LLAMA | {"sliding_window": None}, "unknown key sliding_window"),  # another family's key is unknown here
    (QWEN2 | {"attention_bias": True}, "unknown key attention_bias = True"),
    (QWEN2 | {"use_mrope": True}, "use_mrope = True"),
    (QWEN2 | {"layer_types": ["full_attention"]}, "layer_types = "),
    (QWEN2 | {"layer_types": ["sliding_attention"] * 28}, "layer_types = "),  # without use_sliding_window
    (QWEN2 | {"max_window_layers": "28"}, "max_window_layers = '28'"),
    (LLAMA | {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented; expected one of silu"),
    (LLAMA | {"quantization_config": {"quant_method": "awq"}}, "quantization_config = "),
    (LLAMA | {"is_encoder_decoder": True}, "is_encoder_decoder = True"),
    (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    (LLAMA | {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    (LLAMA | {"hidden_size": 4095}, "hidden_size = 4095|num_attention_heads"),
    (LLAMA | {"hidden_size": "4096"}, "hidden_size = '4096'"),
    (LLAMA | {"hidden_size": True}, "hidden_size = True"),
    (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    (LLAMA | {"num_key_value_heads": 5}, "num_key_value_heads = 5 .*divisor of num_attention_heads = 32"),
    (LLAMA | {"head_dim": 127}, "head_dim = 127 .*even"),
    (LLAMA | {"rms_norm_eps": 0}, "rms_norm_eps = 0"),
    (LLAMA | {"tie_word_embeddings": 1}, "tie_word_embeddings = 1 .*true or false"),
    (LLAMA | {"rope_theta": float("inf")}, "rope_theta = inf"),
    (without(LLAMA, "hidden_size"), "no key 'hidden_size'"),
    (without(LLAMA, "vocab_size"), "no key 'vocab_size'"),
    (GEMMA | {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    (GEMMA | {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    (GEMMA | {"hidden_activation": "relu"}, "hidden_activation = 'relu'"),
    (scaled(type="ntk", factor=2.0), "rope_type = 'ntk' .*expected one of default, linear, dynamic"),
    (scaled(type="mrope", mrope_section=[1, 2]), "rope_type = 'mrope'"),
    (scaled(type="linear", rope_type="dynamic", factor=2.0), "type = 'linear'"),
    (scaled(type="linear"), "rope_scaling has no key 'factor'"),
    (scaled(type="linear", factor=0), "factor = 0"),
    (scaled(type="linear", factor=2.0, alpha=3), "rope_scaling: unknown key alpha = 3"),
    (scaled(type="llama3", factor=8.0, low_freq_factor=4, high_freq_factor=4), "high_freq_factor = 4.0"),
    (scaled(type="longrope", short_factor=[1.0] * 64, long_factor=[1.0] * 63), "long_factor = .*64 positive numbers"),
    (scaled(type="longrope", short_factor=["1"] * 64, long_factor=[1.0] * 64), "short_factor = "),
    (scaled(type="yarn", factor=2.0, partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    (LLAMA2 | {"rope_scaling": [2.0]}, "rope_scaling = .*an object"),
    (LLAMA | {"rope_parameters": {"rope_type": "default"}}, "rope_scaling = .*not two that differ"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_spec(config)


def test_every_key_of_a_published_config_matters_or_is_excused() -> None:
    """Renaming any key of a config makes it unknown, whatever it was."""
    for key in LLAMA.keys() - {"architectures", "model_type"}:
        with pytest.raises(ConfigError, match=f"{key}_x"):
            read_spec({f"{k}_x" if k == key else k: v for k, v in LLAMA.items()} | {key: LLAMA[key]})


def test_scalings() -> None:
    def scaling(config: dict[str, Any]) -> Any:
        return read_spec(config).layers[0].mixer.rope.scaling

    assert scaling(scaled(type="linear", factor=2)) == scaling(scaled(rope_type="linear", factor=2)) == Linear(2.0)
    assert scaling(scaled(type="yarn", factor=2.0)) == Yarn(2.0, 4096)
    assert scaling(scaled(type="yarn", factor=4.0) | {"original_max_position_embeddings": 1024}) == Yarn(4.0, 1024)
    ones = {"short_factor": [1] * 64, "long_factor": [2] * 64}
    expected = LongRope(4.0, 1024, (1.0,) * 64, (2.0,) * 64)
    assert scaling(scaled(type="longrope", original_max_position_embeddings=1024, **ones)) == expected
    assert scaling(scaled(type="default")) is scaling({**LLAMA2, "rope_scaling": {}}) is None


def test_windows_of_qwen2() -> None:
    def windows(**more: Any) -> list[int]:
        spec = read_spec(QWEN2 | {"num_hidden_layers": 4, "sliding_window": 9, "max_window_layers": 3} | more)
        return [layer.mixer.window for layer in spec.layers]

    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    assert windows() == windows(use_sliding_window=True, sliding_window=None) == [0, 0, 0, 0]
    assert windows(use_sliding_window=True) == [0, 0, 0, 9]
    assert windows(use_sliding_window=True, layer_types=types) == [9, 0, 9, 0]


def test_activation_of_gemma() -> None:
    def act(**more: Any) -> str:
        return read_spec(GEMMA | more).layers[0].feedforward.act

    assert act(hidden_act="gelu") == act(hidden_act="gelu_pytorch_tanh") == "gelu_tanh"
    assert act(hidden_activation=None) == act(hidden_activation="gelu_pytorch_tanh") == "gelu_tanh"
    assert act(hidden_activation="gelu") == "gelu"


@pytest.mark.parametrize(
    ("config", "format"),
    [
        ({"torch_dtype": "bfloat16"}, "bf16"),
        ({"dtype": "float16"}, "f16"),
        ({"torch_dtype": "torch.float32"}, "f32"),
        ({"torch_dtype": None}, "f32"),
        ({}, "f32"),
    ],
)
def test_stored_format(config: dict[str, Any], format: str) -> None:
    assert stored_format(config) == format


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "auto", 16])
def test_stored_format_refused(dtype: Any) -> None:
    with pytest.raises(ConfigError, match=r"dtype .* is not implemented; expected bfloat16, float16, float32"):
        stored_format({"torch_dtype": dtype})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a list"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_load_config(text: str | bytes | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path)


# The registry


def test_architecture_goes_before_model_type() -> None:
    assert family_of({"architectures": ["MistralForCausalLM"], "model_type": "llama"}).name == "mistral"
    assert family_of({"model_type": "qwen2"}).name == family_of({"architectures": [], "model_type": "qwen2"}).name
    assert family_of({"architectures": ["LlamaModel"], "model_type": "qwen2"}).name == "llama"  # a model without a head
    for wrong in ("LlamaForSequenceClassification", "UnknownModel", "Qwen3ForTokenClassification"):
        with pytest.raises(
            UnsupportedArchitectureError, match=rf"{wrong}.*known are .*GemmaForCausalLM, .*LLaMAForCausalLM"
        ):
            family_of({"architectures": [wrong], "model_type": "llama"})
    with pytest.raises(UnsupportedArchitectureError, match="model_type None"):
        family_of({})
    with pytest.raises(ConfigError, match="architectures = 'LlamaForCausalLM'"):
        family_of({"architectures": "LlamaForCausalLM"})


def test_a_plugin_adds_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = family_of(LLAMA)
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))

    def read(reader: Any) -> ModelSpec:
        reader.only("my_own_key", 3)
        return llama.read(reader)

    register(Family("mine", ("MyLlama",), read, llama.source))
    config = LLAMA | {"architectures": ["MyLlama"], "my_own_key": 3}
    assert read_spec(config) == read_spec(LLAMA)
    with pytest.raises(ConfigError, match="my_own_key = 4"):
        read_spec(config | {"my_own_key": 4})
    with pytest.raises(ModelError, match="family 'llama' already reads architecture 'LlamaForCausalLM'"):
        register(replace(llama, name="other"))


PLUGIN = """
from penstock.models import Family, family_of, register

llama = family_of({"model_type": "llama"})
register(Family("plugged", ("PluggedForCausalLM",), llama.read, llama.source))
"""


def test_a_package_adds_a_family_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugged_family.py").write_text(PLUGIN)
    info = tmp_path / "plugged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[penstock.plugins]\nplugged = plugged_family\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    assert read_spec(LLAMA | {"architectures": ["PluggedForCausalLM"]}) == read_spec(LLAMA)
    plugins.unload("plugged_family")


# The spec's JSON


def test_spec_json_names_what_it_does_not_know() -> None:
    data = read_spec(LLAMA).to_json()
    assert [run["count"] for run in data["layers"]] == [32]  # equal layers are written once
    for wrong, message in [
        ({"final_norm": {"kind": "Pnorm"}}, "kind 'Pnorm'; known are Alibi, Attention"),
        ({"logit_bias": 1}, "unknown fields .'logit_bias'."),
    ]:
        with pytest.raises(ModelError, match=message):
            ModelSpec.from_json({**json.loads(json.dumps(data)), **wrong})
    del data["vocab_size"]
    with pytest.raises(ModelError, match=r"ModelSpec is incomplete.*vocab_size"):
        ModelSpec.from_json(data)
