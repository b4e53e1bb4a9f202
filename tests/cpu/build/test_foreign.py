"""Megatron's and NeMo's shards become the Hugging Face checkpoint that they were made from, bit for bit."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

from penstock import LLM, SamplingParams
from penstock.cli import main
from penstock.compiler.convert import convert
from penstock.compiler.weights import compute
from penstock.engine.manifest import Weight
from penstock.errors import CheckpointError, ConfigError, OptionError, PenstockError, UnsupportedError
from penstock.ir.graph import Graph
from penstock.kernels.tactic import PLAIN
from penstock.models.foreign.facts import hf_config, read_facts
from penstock.models.foreign.settings import parse_yaml
from penstock.models.foreign.shards import Shards
from penstock.models.foreign.tensors import expressions
from tests.cpu import tiny as tiny_llama
from tests.cpu.build.engines import tiny
from tests.cpu.build.megatron import NEMO, gpt_args, llama_args, write_megatron


def config_of(hf: Path) -> dict[str, Any]:
    config = json.loads((hf / "config.json").read_text())
    assert isinstance(config, dict)
    return config


def shards_of(hf: Path, out: Path, tp: int, pp: int, style: str = "core", through: bool = False, **more: Any) -> Path:
    settings = {"args.json": json.dumps(llama_args(config_of(hf)) | more)}
    return write_megatron(hf, out, tp, pp, style, settings, through=through)


def assert_same(a: Path, b: Path) -> None:
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert x.dtype == theirs[name].dtype and torch.equal(x, theirs[name]), name


CASES = [
    ("llama", 1, 1, "core"), ("llama", 2, 1, "plain"), ("llama", 2, 2, "old"), ("llama-mqa", 1, 3, "core"),
    ("llama-mha-tied", 4, 2, "core"), ("llama-mha-tied", 2, 2, "old"), ("llama-biases", 2, 1, "core"),
    ("llama-head-dim", 2, 2, "plain"), ("qwen2", 2, 1, "core"), ("qwen3", 2, 2, "core"), ("llama-theta", 1, 2, "old"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "tp", "pp", "style"), CASES)
def test_every_tensor_comes_back(case: str, tp: int, pp: int, style: str, tmp_path: Path) -> None:
    hf = tiny(case, tmp_path)
    out = convert(shards_of(hf, tmp_path / "in", tp, pp, style), tmp_path / "out", model_format="megatron")
    assert_same(out, hf)
    ours, theirs = AutoConfig.from_pretrained(out).to_dict(), AutoConfig.from_pretrained(hf).to_dict()
    for key in ("architectures", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
                "max_position_embeddings", "vocab_size", "intermediate_size", "hidden_act", "model_type"):  # fmt: skip
        assert ours[key] == theirs[key], key


def test_nemos_settings_and_names(tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    settings = {"model_config.yaml": NEMO.format(tp=2, pp=2, **config_of(hf))}
    out = convert(write_megatron(hf, tmp_path / "in", 2, 2, "nemo", settings), tmp_path / "out", model_format="nemo")
    assert_same(out, hf)
    assert config_of(out)["rms_norm_eps"] == 1e-6


def test_layers_counted_through_and_flat_files(tmp_path: Path) -> None:
    hf = tiny("llama-mqa", tmp_path)
    through = shards_of(hf, tmp_path / "a", 1, 3, through=True)
    assert_same(convert(through, tmp_path / "b", model_format="megatron"), hf)
    for folder in list(through.iterdir()):
        if folder.is_dir():
            (folder / "model.safetensors").rename(through / f"{folder.name}.safetensors")
            folder.rmdir()
    assert_same(convert(through, tmp_path / "c", model_format="megatron"), hf)
    single = shards_of(hf, tmp_path / "d", 1, 1)
    iteration = tmp_path / "run" / "iter_0000100"
    iteration.mkdir(parents=True)
    (single / "mp_rank_00" / "model.safetensors").rename(iteration / "weights.safetensors")
    (single / "args.json").rename(tmp_path / "run" / "args.json")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("100\n")
    assert_same(convert(tmp_path / "run", tmp_path / "e", model_format="megatron"), hf)


def test_the_text_is_that_of_the_model(tmp_path: Path) -> None:
    """From shards to an engine, with the tokenizer beside them, in another precision's files too."""
    hf = tiny_llama.write(tmp_path / "hf")
    shards = shards_of(hf, tmp_path / "in", 2, 2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (shards / name).write_bytes((hf / name).read_bytes())
    out = convert(shards, tmp_path / "out", model_format="megatron")
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    texts = []
    for model in (hf, out):
        with LLM(str(model), device="cpu", cache_dir=tmp_path / "cache", max_batch_size=2, max_num_tokens=64) as llm:
            texts.append([o.outputs[0].token_ids for o in llm.generate(["In the beginning", "A tuple is"], params)])
    assert texts[0] == texts[1]
    half = convert(shards, tmp_path / "half", "bfloat16", model_format="megatron")
    assert {x.dtype for x in load_file(half / "model.safetensors").values()} == {torch.bfloat16}


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, out = tiny("llama", tmp_path), tmp_path / "out"
    folders = ["--model_dir", str(shards_of(hf, tmp_path / "in", 2, 1)), "--output_dir", str(out)]
    assert main(["convert", "--model_format", "megatron", *folders]) == 0
    assert "in Hugging Face's layout" in capsys.readouterr().err
    assert_same(out, hf)
    assert main(["convert", "--model_format", "nemo", *folders]) != 0
    assert "has no model_config.yaml" in " ".join(capsys.readouterr().err.split())


def test_what_megatrons_own_converter_from_llama_writes(tmp_path: Path) -> None:
    """No learned positions, rotary ones by the older flag, and defaults of latent attention and of other softmaxes."""
    hf = tiny("llama", tmp_path)
    written = {"add_position_embedding": False, "use_rotary_position_embeddings": True, "softmax_type": "vanilla",
               "position_embedding_type": "learned_absolute", "rotary_scaling_factor": 1.0, "glu_linear_offset": 0.0,
               "use_rope_scaling": True, "rope_scaling_factor": 8.0}  # fmt: skip
    out = convert(shards_of(hf, tmp_path / "in", 2, 1, **written), tmp_path / "out", model_format="megatron")
    assert_same(out, hf)
    assert config_of(out)["rope_scaling"]["factor"] == 8.0
    with pytest.raises(OptionError, match="is no converted checkpoint; name an empty or a new directory"):
        convert(tmp_path / "in", out, model_format="megatron")


def test_scaled_positions(tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    facts = {"use_rope_scaling": True, "rope_scaling_factor": 32.0}
    out = convert(shards_of(hf, tmp_path / "a", 1, 1, **facts), tmp_path / "b", model_format="megatron")
    scaling = config_of(out)["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"], scaling["original_max_position_embeddings"]) == (
        "llama3",
        32.0,
        8192,
    )
    linear = shards_of(hf, tmp_path / "c", 1, 1, rotary_seq_len_interpolation_factor=4)
    out = convert(linear, tmp_path / "d", model_format="megatron")
    assert config_of(out)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def gpt(kind: str, directory: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "tie_word_embeddings": kind == "gpt2", "bos_token_id": None, "eos_token_id": None}
    config: Any = (
        GPT2Config(n_embd=48, n_inner=80, n_layer=2, n_head=4, n_positions=64, **sizes)
        if kind == "gpt2"
        else GPTNeoXConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                           max_position_embeddings=64, rotary_pct=0.5, use_parallel_residual=False, **sizes)
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("kind", "tp", "pp", "style"), [
    ("gpt2", 1, 1, "core"), ("gpt2", 2, 2, "old"), ("gpt2", 4, 1, "plain"), ("gpt_neox", 2, 2, "core"),
])  # fmt: skip
def test_gpt_shaped_ones_have_gpt2s_names_and_values(kind: str, tp: int, pp: int, style: str, tmp_path: Path) -> None:
    hf = gpt(kind, tmp_path / "hf")
    args = gpt_args(config_of(hf), bias_gelu_fusion=False)
    shards = Shards.open(write_megatron(hf, tmp_path / "in", tp, pp, style))
    facts = read_facts(args, "megatron", shards)
    config = hf_config(facts, "f32")
    merged = expressions(facts, config["model_type"], shards, "f32")
    shards.checkpoint.check({**merged.tensors, **merged.copies})
    theirs = load_file(hf / "model.safetensors")
    assert merged.tensors.keys() == theirs.keys()
    for name, value in merged.tensors.items():
        weight = Weight(value.type, PLAIN, Graph((value,), ("weight",)))
        assert torch.equal(compute(weight, shards.checkpoint, "cpu"), theirs[name]), name
    # The config means the same model to Hugging Face: equal logits from the tensors above.
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    save_file(theirs, tmp_path / "ours" / "model.safetensors", {"format": "pt"})
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = torch.arange(20)[None]
    changed = {"activation_function": "gelu"} if kind == "gpt2" else {}
    reference = AutoModelForCausalLM.from_pretrained(hf, **changed)
    assert torch.equal(ours.eval()(tokens).logits, reference.eval()(tokens).logits)
    fused = read_facts(args | {"bias_gelu_fusion": True}, "megatron", shards)
    assert (facts.act, fused.act) == ("gelu", "gelu_new")


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_a_gpts_text_is_that_of_the_model(kind: str, tmp_path: Path) -> None:
    hf = gpt(kind, tmp_path / "hf")
    settings = {"args.json": json.dumps(gpt_args(config_of(hf)))}
    shards = write_megatron(hf, tmp_path / "in", 2, 2, "core", settings)
    out = convert(shards, tmp_path / "out", model_format="megatron")
    assert_same(out, hf)
    activation = {"gpt2": "activation_function", "gpt_neox": "hidden_act"}[kind]
    (hf / "config.json").write_text(json.dumps(config_of(hf) | {activation: "gelu_new"}))
    params, texts = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True), []
    for model in (hf, out):
        with LLM(
            str(model), device="cpu", cache_dir=tmp_path / "cache", max_num_tokens=64, skip_tokenizer_init=True
        ) as llm:
            texts.append(llm.generate([{"prompt_token_ids": [1, 2, 3]}], params)[0].outputs[0].token_ids)
    assert texts[0] == texts[1] and len(texts[0]) == 24


def test_norms_stored_less_one(tmp_path: Path) -> None:
    hf = gpt("gpt2", tmp_path / "hf")
    shards = Shards.open(write_megatron(hf, tmp_path / "in", 1, 1))
    facts = read_facts(gpt_args(config_of(hf), apply_layernorm_1p=True), "megatron", shards)
    value = expressions(facts, "gpt2", shards, "f32").tensors["transformer.h.0.ln_1.weight"]
    read = compute(Weight(value.type, PLAIN, Graph((value,), ("weight",))), shards.checkpoint, "cpu")
    assert torch.equal(read, load_file(hf / "model.safetensors")["transformer.h.0.ln_1.weight"] + 1)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"num_experts": 8}, "num_experts = 8 is not implemented; expected None"),
    ({"softmax_type": "learnable"}, "softmax_type = 'learnable' is not implemented; expected 'vanilla'"),
    ({"qk_l2_norm": True}, "qk_l2_norm = True"),
    ({"no_rope_freq": 4}, "no_rope_freq = 4"),
    ({"quick_geglu": True}, "quick_geglu = True"),
    ({"glu_linear_offset": 1.0}, "glu_linear_offset = 1.0"),
    ({"activation_func_clamp_value": 7.0}, "activation_func_clamp_value = 7.0"),
    ({"softmax_scale": 1.0}, "softmax_scale = 1.0"),
    ({"layernorm_epsilon": 1e-3}, "norm_epsilon = 1e-06 is not implemented; expected the same as layernorm_epsilon"),
    ({"checkpoint_version": 0}, "checkpoint_version = 0 is not implemented; expected 3.0 or 2.0"),
    ({"num_layers": 3}, "num_layers = 3 is not implemented; expected 2, as many as the files hold"),
    ({"vocab_size": None}, "the number of tokens without padding"),
    ({"vocab_size": 1000}, "vocab_size = 1000; correct it"),
    ({"tensor_model_parallel_size": 4}, "tensor_model_parallel_size = 4 .* expected 2"),
    ({"num_query_groups": 1}, "num_query_groups = 1 .* a multiple of the 2 tensor ranks"),
    ({"hidden_size": "48"}, "hidden_size = '48' .* a positive integer"),
    ({"normalization": "ScaleNorm"}, "normalization = 'ScaleNorm'"),
    ({"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi'"),
    ({"swiglu": False}, "RMSNorm, gelu_new, rotary positions, 2 KV heads of 4, biases: False is not built"),
    ({"rotary_percent": 0.5}, "is not built yet; convert Llama-shaped ones"),
    ({"ffn_hidden_size": 96}, "expected F32, F16 or BF16 of"),
    ({"add_bias_linear": True}, "lacks tp0/pp0/decoder.layers.0.mlp.linear_fc1.bias"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), SETTINGS)
def test_settings_that_contradict_or_are_not_built(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    shards = shards_of(tiny("llama", tmp_path), tmp_path / "in", 2, 1, **change)
    with pytest.raises((ConfigError, UnsupportedError, CheckpointError), match=message):
        convert(shards, tmp_path / "out", model_format="megatron")
    assert not (tmp_path / "out").exists()


def test_files_that_are_missing_doubled_or_pickled(tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    shards = shards_of(hf, tmp_path / "in", 2, 2)

    def refused(message: str, path: Path = shards, **more: Any) -> None:
        with pytest.raises(PenstockError, match=message):
            convert(path, tmp_path / "out", **({"model_format": "megatron"} | more))

    refused("model_format='gguf' is not one of hf, megatron, nemo", model_format="gguf")
    refused("tp_size=2, pp_size=1 with model_format='megatron': convert the Hugging Face", tp_size=2)
    refused("dtype='int4'", dtype="int4")
    refused(r"has no model_config\.yaml", model_format="nemo")
    nemo = tmp_path / "model.nemo"
    nemo.write_bytes(b"x")
    refused(r"model\.nemo is a pickled file.*torch\.load.*save_file", nemo, model_format="nemo")
    file = shards / "mp_rank_01_001" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "decoder.layers.0.new": torch.zeros(2)}, file)
    refused("tp1/pp1/decoder.layers.1.new")
    save_file({**tensors, "module.decoder.layers.0.mlp.linear_fc2.weight": torch.zeros(2)}, file)
    refused("are one tensor")
    save_file({k: v for k, v in tensors.items() if "final" not in k}, file)
    refused("lacks tp1/pp1/decoder.final_norm.weight")
    save_file({k.replace("layers.0", "layers.5"): v for k, v in tensors.items()}, file)
    file.rename(shards / "mp_rank_01_001" / "model_optim_rng.pt")
    refused(r"holds pickled weights only \(model_optim_rng\.pt\)")
    (shards / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    refused("mp_rank_01_001 holds no safetensors file")
    (shards / "mp_rank_01_001").rmdir()
    refused("lacks the file of tensor rank 1, pipeline rank 1, of 2 x 2")


def test_yaml_that_is_read() -> None:
    text = NEMO.format(tp=1, pp=1, max_position_embeddings=1, num_hidden_layers=1, hidden_size=1, intermediate_size=1,
                       num_attention_heads=1, num_key_value_heads=1, vocab_size=1)  # fmt: skip
    import yaml

    ours, theirs = parse_yaml(text), yaml.safe_load(text)
    theirs["data"]["blends"][0]["weight"] = 0.1  # YAML 1.1 has no such number; 1.2 has
    assert ours == theirs
    for text in (
        "a:\n- - 1\n  - 2\n- b: 1\n  c:\n    d: x\n- []\ne: 'x: y'\n\"f g\": -1.5e+3\nh: a#b\n",
        "",
        "- 1\n- .5\n",
    ):
        assert parse_yaml(text) == (yaml.safe_load(text) or {})


@pytest.mark.parametrize("text", [
    "a: &x 1", "a: *x", "a: !!python/object:os.system x", "a: |\n  x", "a: >\n  x", "a: 1\na: 2", "a: yes", "\ta: 1",
    "a: {b: 1}", "a: [[1]]", "a: 1\n  b: 2", "just text", "a: 'x", "? a", "<<: 1", "a: \"\\x00\"",
    "\n".join(" " * n + "a:" for n in range(200)),
])  # fmt: skip
def test_yaml_that_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="line "):
        parse_yaml(text)


def test_the_output_must_be_new(tmp_path: Path) -> None:
    shards = shards_of(tiny("llama", tmp_path), tmp_path / "in", 1, 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("")
    with pytest.raises(OptionError, match="name an empty or a new directory"):
        convert(shards, tmp_path / "out", model_format="megatron")


def test_the_documented_resaving_step(tmp_path: Path) -> None:
    """docs/checkpoints.md's own lines, on a pickled file as Megatron-LM nests it."""
    hf = tiny("llama", tmp_path)
    shards = shards_of(hf, tmp_path / "in", 1, 1, "old", checkpoint_version=None)
    tensors = load_file(shards / "mp_rank_00" / "model.safetensors")
    state: dict[str, Any] = {
        "args": argparse.Namespace(**llama_args(config_of(hf)), path=tmp_path),
        "checkpoint_version": 3.0,
    }
    for name, tensor in tensors.items():
        *outer, last = name.split(".")
        place = state
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = tensor
    (tmp_path / "run" / "mp_rank_00").mkdir(parents=True)
    torch.save(state, tmp_path / "run" / "mp_rank_00" / "model_optim_rng.pt")
    page = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text()
    code = page.split("```python\n")[1].split("```")[0].replace("32000", "99")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "run", check=True)
    assert_same(convert(tmp_path / "run" / "SHARDS", tmp_path / "out", model_format="megatron"), hf)


HOSTILE = [
    ({"rotary_seq_len_interpolation_factor": [1]}, r"rotary_seq_len_interpolation_factor = \[1\]"),
    ({"seq_len_interpolation_factor": "x"}, "expected a positive number"),
    ({"seq_len_interpolation_factor": -2.0}, "expected a positive number"),
    ({"rotary_base": 10**400}, "expected a positive number"),
    (
        {"vocab_size": 99, "true_vocab_size": 98},
        "true_vocab_size = 98 is not implemented; expected the same as vocab_size = 99",
    ),
    ({"norm_epsilon": 0.5, "layernorm_epsilon": 1e-5}, "norm_epsilon = 0.5"),
]


@pytest.mark.parametrize(("settings", "said"), HOSTILE)
def test_settings_that_are_hostile_or_contradict(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    shards = shards_of(tiny("llama", tmp_path), tmp_path / "shards", 1, 1, **settings)
    with pytest.raises(ConfigError, match=said):
        convert(shards, tmp_path / "out", model_format="megatron")
    assert not (tmp_path / "out").exists()


def test_ranks_layers_and_lines_without_end(tmp_path: Path) -> None:
    shards = shards_of(tiny("llama", tmp_path), tmp_path / "shards", 2, 1)
    folder = min(path.parent for path in shards.rglob("*.safetensors"))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"decoder.layers.{'9' * 5000}.x": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds tp0/pp0/decoder\.layers\.9999"):
        convert(shards, tmp_path / "out", model_format="megatron")
    folder.rename(shards / "mp_rank_999999999_000")
    with pytest.raises(CheckpointError, match=r"tensor rank 999999999.*correct its name"):
        convert(shards, tmp_path / "out", model_format="megatron")
    with pytest.raises(ValueError, match="lines, at most"):
        parse_yaml("a: 1\n" * 20_000)
