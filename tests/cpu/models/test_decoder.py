"""What the builder emits: plain ops, one group a size, rounding as models do, and quickly."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest
import torch

from penstock.ir import Graph, tensor
from penstock.ir.interpret import interpret
from penstock.ir.text import parse_graph, print_graph
from penstock.models import Binding, build_forward, random_binding, read_spec, weights
from penstock.models.decoder import _rounded
from penstock.spec import ModelSpec
from tests.cpu.models.harness import Pool, Request, run_step
from tests.facts.tensors import published_config
from tests.golden.specs import FAMILIES


def small(stem: str, **more: object) -> tuple[ModelSpec, Binding]:
    """A published architecture at a tiny size."""
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50,
    }  # fmt: skip
    config = published_config(stem) | sizes | more
    spec = read_spec(config)
    return spec, weights(spec, config, "f32")


def test_ops_of_a_layer() -> None:
    spec, binding = small("Llama-3.1-8B")
    graph = build_forward(spec, binding, "f32", 16)
    ops = Counter(node.op for node in graph)
    layer = {"rms_norm": 2, "linear": 7, "rope": 2, "kv_append": 1, "attention": 1, "add": 2, "glu": 1}
    expected = {op: 2 * n for op, n in layer.items()}
    expected["rms_norm"] += 1
    expected["linear"] += 1
    expected |= {"embedding": 1, "take_rows": 1, "literal": 1, "state": 2, "input": 8, "tensor": 21}
    assert ops == expected
    assert graph.names == ("logits", "layers.0.kv", "layers.1.kv")
    assert graph.outputs[0].type == tensor("f32", "L", 50)
    assert {n.name for n in graph.leaves("input")} == {
        "tokens", "positions", "rows", "query_start", "query_len", "context_len", "block_table", "logit_rows",
    }  # fmt: skip
    assert print_graph(parse_graph(print_graph(graph))) == print_graph(graph)


def test_frequencies_are_an_input_only_by_request() -> None:
    spec, binding = small("med42-70b-dynamic")
    graph = build_forward(spec, binding, "f32", 16)
    (freqs,) = (n for n in graph.leaves("input") if n.name == "freqs")
    assert freqs.types == (tensor("f32", "S", 8),) and "literal" not in {n.op for n in graph}


def test_layers_of_one_size_share_a_group() -> None:
    windows = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2, "num_hidden_layers": 5}
    graph = build_forward(*small("Qwen2-7B", **windows), "bf16", 32)
    groups = {node.name: (node.attr("group"), str(node.types[0])) for node in graph.leaves("state")}
    tables = [node.inputs[-1].node.name for node in graph.nodes if node.op == "attention"]
    assert tables == ["block_table"] * 2 + ["block_table1"] * 3
    kv = "bf16[N,2,2,32,16]"
    assert [groups[f"layers.{i}.kv"] for i in range(5)] == [("windowed1" if i >= 2 else "paged0", kv) for i in range(5)]


def test_tied_head_is_one_tensor() -> None:
    _, binding = small("gemma-2b")
    assert binding["head.weight"] == binding["embedding.weight"]
    _, binding = small("Llama-3.1-8B")
    assert binding["head.weight"] != binding["embedding.weight"]


@pytest.mark.parametrize("format", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("size", [48, 2048, 3072, 1023])
def test_embedding_factor_is_rounded_as_a_tensor_would_be(format: str, size: int) -> None:
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[format]
    assert _rounded(size**0.5, tensor(format, 1)) == torch.tensor(size**0.5, dtype=dtype).item()
    spec, binding = small("gemma-2b", hidden_size=size)
    binding = {name: _as(format, value) for name, value in binding.items()}
    scales = [n.attr("factor") for n in build_forward(spec, binding, format, 16) if n.op == "scale"]
    assert scales == [torch.tensor(size**0.5, dtype=dtype).item()]


def _as(format: str, value: object) -> object:
    from penstock.ir import Value, leaf

    assert isinstance(value, Value)
    return leaf("tensor", value.node.name, tensor(format, *value.type.shape))


def test_random_weights_give_sane_logits() -> None:
    for stem in ("Llama-3.1-8B", "gemma-2b", "Qwen3-8B"):
        spec, binding = small(stem)
        random = random_binding(binding)
        assert {n: v.type for n, v in random.items()} == {n: v.type for n, v in binding.items()}
        assert (random["head.weight"] == random["embedding.weight"]) == spec.tied_head
        graph = build_forward(spec, random, "f32", 16)
        assert not graph.leaves("tensor")
        logits = run_step(graph, Pool(graph, {}), [(Request([1, 2, 3]), 3)])
        assert 0.2 < logits.std() < 5


def test_random_weights_differ_by_name_and_repeat() -> None:
    _, binding = small("Qwen2-7B")
    first, second = (_values(random_binding(binding)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len({float(t.flatten()[0]) for t in first.values()}) == len(first)
    assert abs(first["layers.0.mixer_norm.weight"].mean() - 1) < 0.02
    assert abs(first["layers.0.attention.q.bias"].mean()) < 0.02


def _values(binding: Binding) -> dict[str, torch.Tensor]:
    return interpret(Graph(tuple(binding.values()), tuple(binding)), {})


def test_an_80_layer_graph_builds_quickly() -> None:
    config = published_config("Llama-2-70b-hf")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        spec = read_spec(config)
        graph = build_forward(spec, weights(spec, config, "bf16"), "bf16", 64)
        times.append(time.perf_counter() - start)
    assert len(graph.leaves("state")) == 80
    assert min(times) < 0.3, times


def test_a_window_of_the_model_is_one_of_every_layer() -> None:
    spec = FAMILIES["mistral"]
    wide, full = (replace(spec.layers[0], mixer=replace(spec.layers[0].mixer, window=n)) for n in (9, 0))
    assert spec.window == 6 and replace(spec, layers=(spec.layers[0], wide)).window == 9
    assert replace(spec, layers=(spec.layers[0], full)).window == FAMILIES["llama"].window == 0


def test_spec_with_two_request_ropes_is_our_own_mistake() -> None:
    spec, _ = small("med42-70b-dynamic")
    mixer = spec.layers[0].mixer
    other = replace(spec.layers[0], mixer=replace(mixer, rope=replace(mixer.rope, theta=5.0)))
    with pytest.raises(AssertionError, match="at most one rope"):
        _ = replace(spec, layers=(spec.layers[0], other)).request_rope
