"""docs/adding-a-model.md says what is so: its family is Hugging Face's StableLM, its graph by hand says the same."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from penstock import LLM, SamplingParams, plugins
from penstock.cli import main
from penstock.errors import ConfigError
from penstock.models import Checkpoint, build_forward, ignored_tensors, load_config, read_spec, weights
from tests.cpu.cli.test_readme import ROOT, here
from tests.cpu.models import twins
from tests.cpu.models.harness import Pool, Request, load_tensors, run_step

PAGE = (ROOT / "docs" / "adding-a-model.md").read_text("utf-8")
FAMILY, BY_HAND = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"use_qkv_bias": True, "tie_word_embeddings": True},
    "head norms": {"qk_layernorm": True, "num_attention_heads": 4},
    "parallel": {"use_parallel_residual": True, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-3},
}
NEW = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    (folder / "stablelm.py").write_text(FAMILY)
    return folder


@pytest.fixture
def loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(folder))
    plugins.load(["stablelm"])
    yield
    plugins.unload("stablelm")


def save(case: str, directory: Path) -> Any:
    """Hugging Face's model of a case, saved."""
    config = transformers.StableLmConfig(**{**twins.SIZES, "hidden_size": 64, **CASES[case]})
    torch.manual_seed(len(case))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(noise * 0.3) if parameter.dim() == 1 else parameter.copy_(
                noise * parameter.shape[-1] ** -0.5
            )
    model.eval().save_pretrained(directory)
    return model


def test_its_length_is_what_it_says() -> None:
    (stated,) = re.findall(r"^## StableLM, from nothing: (\d+) lines$", PAGE, re.MULTILINE)
    assert len(FAMILY.splitlines()) == int(stated)


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("case", CASES)
def test_logits_and_tokens_are_hugging_faces(case: str, tmp_path: Path) -> None:
    model = save(case, tmp_path)
    config = load_config(tmp_path)
    spec = read_spec(config)
    binding, checkpoint = weights(spec, config, "f32"), Checkpoint.open(tmp_path)
    checkpoint.check(binding, ignored_tensors(spec, config))
    graph = build_forward(spec, binding, "f32", 16)
    request = Request(torch.randint(0, 99, (21,)).tolist())
    ours = run_step(graph, Pool(graph, load_tensors(checkpoint, binding)), [(request, 21)])[0]
    theirs = twins.truth(model, request.tokens)[-1]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4
    with LLM(tmp_path, device="cpu", cache_dir=tmp_path / "cache", skip_tokenizer_init=True, max_batch_size=2) as llm:
        params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
        (output,) = llm.generate({"prompt_token_ids": request.tokens}, params)
        assert llm.engine.plugins["stablelm"]["parts"] == {"family": ["stablelm"]}
    text = [*request.tokens, *output.outputs[0].token_ids]
    assert twins.truth(model, text[:-1])[20:].argmax(-1).tolist() == text[21:]


@pytest.mark.usefixtures("loaded")
def test_a_key_that_it_does_not_take_is_named(tmp_path: Path) -> None:
    save("plain", tmp_path)
    with pytest.raises(ConfigError, match="unknown key use_magic = True"):
        read_spec({**load_config(tmp_path), "use_magic": True})


def test_it_is_found_by_name_on_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save("plain", tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    assert main(["check", str(tmp_path), "--device", "cpu"]) == 1
    assert "StableLmForCausalLM" in capsys.readouterr().err
    assert main(["check", str(tmp_path), "--device", "cpu", "--plugin", "stablelm"]) == 0
    assert "stablelm (StableLmForCausalLM)" in capsys.readouterr().out
    plugins.unload("stablelm")


CHECK = """
import torch
t = {name: torch.from_numpy(array).float() for name, array in arrays.items()}
angle = torch.outer(torch.arange(64.0), torch.tensor([10000.0 ** (-2 * i / D) for i in range(D // 2)]))
cos, sin = angle.cos().repeat(1, 2)[:, None], angle.sin().repeat(1, 2)[:, None]
turn = lambda x: x * cos[: len(x)] + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin[: len(x)]
ids = [3, 1, 4]
for _ in range(8):
    h = t["table"][ids]
    x = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * t["gain"]
    q, k, v = ((x @ t[name].T).unflatten(-1, (H, D)) for name in "qkv")
    y = torch.nn.functional.scaled_dot_product_attention(*(z.transpose(0, 1) for z in (turn(q), turn(k), v)), is_causal=True)
    h = h + y.transpose(0, 1).flatten(-2) @ t["o"].T
    ids.append(int((h[-1] @ t["head"].T).argmax()))
assert list(output.outputs[0].token_ids) == ids[3:], (output.outputs[0].token_ids, ids)
assert len(set(ids)) > 4
"""  # noqa: E501


def test_the_graph_by_hand_is_what_it_says(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BY_HAND + CHECK]
    done = subprocess.run(command, cwd=tmp_path, env=here(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fired, count = done.stdout.splitlines()
    assert "fuse_attention" in fired and count == "8" and (tmp_path / "by_hand" / "engine.json").is_file()
