"""`convert`: its tensors are those of NVIDIA's layout, and building from them is building from the model."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.compiler import convert as module
from penstock.compiler.convert import convert
from penstock.engine import store
from penstock.errors import CheckpointError, ConfigError, OptionError, ResourceError, UnsupportedError
from penstock.models.directory import ModelDirectory
from tests.cpu.build.engines import contents, engine_of, same_weights, tiny
from tests.facts.trtllm import write_trtllm

DEALT = [
    ("llama", 1, 1), ("llama", 4, 2), ("llama-mha-tied", 2, 1), ("llama-mqa", 4, 2), ("llama-biases", 2, 1),
    ("mistral-window", 2, 1), ("qwen2", 2, 2), ("qwen2-tied-mqa", 4, 1), ("qwen3", 2, 1), ("qwen3-biases-tied", 2, 2),
    ("gemma", 1, 1),
]  # fmt: skip


def theirs(hf: Path, out: Path, tp: int, pp: int, dtype: str) -> Path:
    config = json.loads((hf / "config.json").read_text())
    write_trtllm(config, load_file(hf / "model.safetensors"), out, tp, pp, dtype)
    return out


def assert_same_tensors(a: Path, b: Path, ranks: int) -> None:
    for rank in range(ranks):
        ours, other = (load_file(d / f"rank{rank}.safetensors") for d in (a, b))
        assert ours.keys() == other.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), (rank, name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("case", "tp", "pp"), DEALT)
def test_tensors_are_those_of_the_published_layout(case: str, tp: int, pp: int, dtype: str, tmp_path: Path) -> None:
    hf = tiny(case, tmp_path)
    ours = convert(hf, tmp_path / "ours", dtype, tp, pp)
    assert_same_tensors(ours, theirs(hf, tmp_path / "theirs", tp, pp, dtype), tp * pp)
    stated = json.loads((ours / "config.json").read_text())
    wanted = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for key in ("architecture", "dtype", "vocab_size", "head_size", "num_key_value_heads", "norm_epsilon"):
        assert stated[key] == wanted[key]
    assert {k: stated["mapping"][k] for k in ("tp_size", "pp_size", "world_size")} == {
        "tp_size": tp, "pp_size": pp, "world_size": tp * pp,
    }  # fmt: skip


def test_gemma_of_two_ranks_deals_its_table(tmp_path: Path) -> None:
    hf = tiny("gemma", tmp_path)
    config = json.loads((hf / "config.json").read_text()) | {"vocab_size": 98}
    tensors = load_file(hf / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:98].contiguous()
    (hf / "config.json").write_text(json.dumps(config))
    save_file(tensors, hf / "model.safetensors")
    ours = convert(hf, tmp_path / "ours", "float16", 2)
    assert_same_tensors(ours, theirs(hf, tmp_path / "theirs", 2, 1, "float16"), 2)


@pytest.mark.parametrize(("case", "tp", "pp"), [d for d in DEALT if d[0] != "gemma"])
def test_building_from_it_gives_the_same_engine(case: str, tp: int, pp: int, tmp_path: Path) -> None:
    """Equal weights bit for bit, and an equal spec: the window of Mistral, biases and all."""
    hf = tiny(case, tmp_path)
    converted = convert(hf, tmp_path / "converted", "auto", tp, pp)
    direct, classic = engine_of(hf, tmp_path, "direct"), engine_of(converted, tmp_path, "classic")
    assert same_weights(direct, classic)
    a, b = store.load(direct), store.load(classic)
    assert (a.spec, a.profile, a.tokens) == (b.spec, b.profile, b.tokens)
    lowered = [e.programs["decode"].phases["forward"].graph for e in (a, b)]
    assert [n.op for n in lowered[0].nodes] == [n.op for n in lowered[1].nodes]


def test_gemma_differs_by_its_norms_alone(tmp_path: Path) -> None:
    hf = tiny("gemma", tmp_path)
    converted = convert(hf, tmp_path / "converted", "float32", 2)
    norms = load_file(hf / "model.safetensors")["model.norm.weight"] + 1.0
    assert torch.equal(load_file(converted / "rank0.safetensors")["transformer.ln_f.weight"], norms)
    again = convert(converted, tmp_path / "again", "float32", 2)
    assert_same_tensors(converted, again, 2)  # 1 is not added twice


def test_dealing_anew_is_dealing_directly(tmp_path: Path) -> None:
    hf = tiny("qwen2", tmp_path)
    first = convert(hf, tmp_path / "first", "float16", 4, 2)
    assert_same_tensors(convert(first, tmp_path / "two", "auto", 2), convert(hf, tmp_path / "direct", "float16", 2), 2)


def test_nothing_of_the_model_is_lost(tmp_path: Path) -> None:
    hf = tiny("mistral-window", tmp_path)
    config = json.loads((hf / "config.json").read_text()) | {"eos_token_id": 7}
    (hf / "config.json").write_text(json.dumps(config))
    (hf / "generation_config.json").unlink(missing_ok=True)
    (hf / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tools.jinja").write_text("y")
    out = convert(hf, tmp_path / "out", "float16")
    assert (out / "tokenizer_config.json").read_text() == '{"chat_template": "x"}'
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "y"
    model = ModelDirectory.open(out)
    assert model.config == config | {"dtype": "float16"} and model.spec.layers[0].mixer.window == 11
    assert store.load(engine_of(out, tmp_path)).tokens["eos"] == [7]


def test_a_changed_field_of_ours_is_refused(tmp_path: Path) -> None:
    out = convert(tiny("llama", tmp_path), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    for change in ({"norm_epsilon": 0.5}, {"new": 1}, {"hidden_size": 50}, {"penstock": {"config": 3}}):
        (out / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ConfigError, match=next(iter(change))):
            ModelDirectory.open(out)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "int4"}, "dtype='int4' is not one of auto"),
    ({"tp_size": 0}, "tp_size=0"),
    ({"tp_size": 3}, "tp_size=3 does not divide the model's 4 heads"),
    ({"pp_size": 3}, "pp_size=3 exceeds the model's 2 layers"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_arguments(bad: dict[str, Any], message: str, tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    with pytest.raises(OptionError, match=message):
        convert(hf, tmp_path / "out", **bad)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_what_the_layout_has_no_word_for(tmp_path: Path) -> None:
    hf = tiny("gemma", tmp_path)
    config = json.loads((hf / "config.json").read_text()) | {"hidden_activation": "gelu"}
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"a gemma model with .*act='gelu'"):
        convert(hf, tmp_path / "out")


def test_a_broken_model_leaves_nothing(tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    file = hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        convert(hf, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_the_output_is_replaced_only_if_it_is_ours(tmp_path: Path) -> None:
    hf, out = tiny("llama", tmp_path), tmp_path / "out"
    for wrong in (hf, tmp_path):
        with pytest.raises(OptionError, match="holds the model itself"):
            convert(hf, wrong)
    out.mkdir()
    convert(hf, out, tp_size=2)
    convert(hf, out)
    assert sorted(p.name for p in out.glob("rank*")) == ["rank0.safetensors"]
    (out / "config.json").write_text("{}")
    with pytest.raises(OptionError, match="is no converted checkpoint"):
        convert(hf, out)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf, out = tiny("llama", tmp_path), tmp_path / "out"
    convert(hf, out)
    before = contents(out)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_weights", full)
    with pytest.raises(ResourceError, match="no space left under"):
        convert(hf, out, "float16")
    assert contents(out) == before and sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_a_rename_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf, out = tiny("llama", tmp_path), tmp_path / "out"
    convert(hf, out)
    before, rename = contents(out), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        convert(hf, out, "float16")
    assert contents(out) == before and sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_progress_ends_at_all_bytes(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    out = convert(tiny("llama", tmp_path), tmp_path / "out", tp_size=2, progress=lambda *each: seen.append(each))
    size = sum(t.nbytes for r in range(2) for t in load_file(out / f"rank{r}.safetensors").values())
    assert seen[-1] == ("convert", size, size)


def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    """96 MiB of weights in 4 MiB tensors, dealt over two ranks: the process grows by far less than them all."""
    hf, tensor = tmp_path / "hf", 1024
    hf.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tensor, "hidden_size": tensor,
        "intermediate_size": tensor, "num_hidden_layers": 3, "num_attention_heads": 8, "hidden_act": "silu",
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "dtype": "float32",
    }  # fmt: skip
    (hf / "config.json").write_text(json.dumps(config))
    from penstock.models.binding import declared
    from penstock.models.registry import read_spec, weights

    names = declared(weights(read_spec(config), config, "f32"))
    save_file({name: torch.zeros(type.concrete({})) for name, type in names.items()}, hf / "model.safetensors")
    code = (
        "import sys, resource; from pathlib import Path; from penstock.compiler.convert import convert\n"
        "import torch; torch.set_num_threads(1)\n"
        "def anonymous():\n"
        "    return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])\n"
        "most = [0]\n"
        "def watch(*_): most[0] = max(most[0], anonymous())\n"
        "torch.zeros(4).add_(1); start = anonymous()\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), 'bfloat16', 2, progress=watch)\n"
        "print((most[0] - start) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(hf), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 60
