"""`penstock.compile`: a graph and arrays to an engine, which says the same as one built from a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import penstock
from penstock import LLM, SamplingParams
from penstock.cli import main
from penstock.engine import manifest
from penstock.engine.profile import Profile
from penstock.errors import CheckpointError, GraphError, OptionError, PluginError
from penstock.ir import Graph, emit, leaf, tensor
from penstock.ir.rewrite import substitute
from penstock.models import build_forward, declared
from penstock.models.directory import ModelDirectory

PROFILE = Profile(max_batch_size=4, max_num_tokens=24, max_seq_len=128)
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": ids} for ids in ([5, 6, 7], [9] * 40, [11])]

Parts = tuple[Graph, dict[str, Any]]


@pytest.fixture(scope="module")
def parts(tiny_model: Path) -> Parts:
    """The graph and the tensors of the tiny Llama."""
    model = ModelDirectory.open(tiny_model)
    binding, checkpoint = model.binding("f32"), model.checkpoint()
    graph = build_forward(model.spec, binding, "f32", PROFILE.block_size)
    return graph, {name: checkpoint.read(name, "f32") for name in declared(binding)}


def tokens(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]


def test_a_graph_and_arrays_say_what_the_checkpoint_says(
    parts: Parts, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph, arrays = parts
    with LLM(tiny_model, device="cpu", cache_dir=tmp_path, max_batch_size=4, max_num_tokens=24) as llm:
        want = tokens(llm)
    given = {name: array.numpy().astype(np.float64) for name, array in arrays.items()}
    engine = penstock.compile(graph, given, PROFILE, eos=[1], tokenizer=tiny_model, device="cpu", cache_dir=tmp_path)
    assert engine.tokens["eos"] == [1] and engine.vocab_size == 300 and engine.format == "f32"
    with LLM(engine, cache_dir=tmp_path, device="cpu") as llm:
        assert tokens(llm) == want
        assert llm.generate("In the", GREEDY)[0].outputs[0].text
    assert engine.directory is not None and main(["inspect", str(engine.directory)]) == 0
    assert "penstock.compile" in capsys.readouterr().out
    lost = manifest.from_json(manifest.to_json(engine))
    with pytest.raises(OptionError, match="not read from a directory"):
        LLM(lost, device="cpu")
    alone = Path(shutil.copytree(engine.directory, tmp_path / "alone"))
    with LLM(alone, device="cpu") as llm:
        assert tokens(llm) == want


def test_the_cache_knows_graph_arrays_and_limits(parts: Parts, tmp_path: Path) -> None:
    graph, arrays = parts
    stages: list[str] = []

    def place(graph: Graph = graph, arrays: Mapping[str, Any] = arrays, profile: Profile = PROFILE) -> Path | None:
        told = {"device": "cpu", "cache_dir": tmp_path, "progress": lambda stage, *_: stages.append(stage)}
        return penstock.compile(graph, arrays, profile, **told).directory

    first = place()
    assert "cached" not in stages and place() == first and "cached" in stages
    name = next(iter(arrays))
    others = [
        place(arrays=arrays | {name: arrays[name] + 1.0}),
        place(profile=Profile(4, 24, 64)),
        place(graph=substitute(graph, {(a := scaled(graph))[0]: a[1]})),
    ]
    assert len({first, *others}) == 4


def scaled(graph: Graph) -> tuple[Any, Any]:
    (node,) = (n for n in graph.nodes if n.op == "embedding")
    return node[0], emit("scale", emit("embedding", *node.inputs)[0], factor=2.0)[0]


def leaves(name: str, *shape: Any, kind: str = "input", format: str = "i32", **more: Any) -> Any:
    return leaf(kind, name, tensor(format, *shape), **more)


def small(tokens: Any = None, logits: str = "logits", out: str = "f32", **states: Any) -> Graph:
    table = leaves("table", 9, 4, kind="tensor", format="f32")
    h = emit("embedding", tokens or leaves("tokens", "T"), table)[0]
    h = emit("take_rows", h, leaves("logit_rows", "L"))[0]
    return Graph((emit("linear", h, table, out=out)[0], *states.values()), (logits, *states))


def with_state() -> Graph:
    return small(kv=leaves("kv", "N", 2, 1, 64, 4, kind="state", format="f32", group="paged0"))


def attending(table: str = "block_table", window: int = 0, **groups: Any) -> Graph:
    """Keys and values of each of these states appended, and attention over the first."""
    where = [leaves("positions", "T"), leaves("rows", "T"), leaves(table, "S", "M")]
    h = emit("embedding", leaves("tokens", "T"), leaves("table", 9, 4, kind="tensor", format="f32"))[0]
    states = {
        name: emit("kv_append", leaves(name, "N", 2, 1, 64, 4, kind="state", format="f32", **attrs), h, h, *where)[0]
        for name, attrs in groups.items()
    }
    spans = [leaves(name, "S") for name in ("query_start", "query_len", "context_len")]
    seen = {"window": window} if window else {}
    y = emit("attention", h, next(iter(states.values())), *spans, where[2], heads=1, scale=1.0, **seen)[0]
    logits = emit("linear", emit("take_rows", y, leaves("logit_rows", "L"))[0], h.node.inputs[1], out="f32")[0]
    return Graph((logits, *states.values()), ("logits", *states))


PAGED, SLIDING = {"group": "paged0"}, {"group": "windowed1", "window": 8}
LONE = {"group": "windowed0", "window": 8}
TABLE = np.zeros((9, 4), np.float32)
OTHER_BLOCK = leaves("kv", "N", 2, 1, 16, 4, kind="state", format="f32", group="paged0")
NO_GROUP = leaves("kv", "N", 2, 1, 64, 4, kind="state", format="f32")


def state(group: str, heads: Any = 1, **more: Any) -> Any:
    name = "w" if more == {"window": 5} else "kv"
    return leaves(name, "N", 2, heads, 64, 4, kind="state", format="f32", group=group, **more)


WRONG: list[tuple[Callable[[], Any], Any, type[Exception], str]] = [
    (
        lambda: small(leaves("words", "T")),
        {},
        GraphError,
        r"input 'words' of type i32\[T\].*tokens i32\[T\], positions",
    ),
    (lambda: small(leaves("tokens", "S")), {}, GraphError, r"input 'tokens' of type i32\[S\]"),
    (lambda: small(logits="scores"), {}, GraphError, r"gives None as 'logits'.*f32\[L,V\]"),
    (lambda: small(out="bf16"), {}, GraphError, r"gives bf16\[L,9\]"),
    (lambda: small(kv=OTHER_BLOCK), {}, GraphError, r"state 'kv' is f32\[N,2,1,16,4\].*\[N,2,K,64,D\]"),
    (lambda: small(kv=NO_GROUP), {}, GraphError, "as the attribute `group`.*paged0"),
    (lambda: small(more=leaves("positions", "T")), {}, GraphError, r"results \['more'\]"),
    (lambda: small(leaves("tokens", "T", kind="weight")), {}, GraphError, "a 'tensor'"),
    (small, {"table": TABLE}, GraphError, "no state"),
    (lambda: attending(a=PAGED, b=SLIDING), {}, GraphError, r"group windowed1 by 'block_table'.*'block_table1'"),
    (lambda: attending("block_table1", a=PAGED), {}, GraphError, "group paged0 by 'block_table1'"),
    (lambda: attending(a=LONE), {}, GraphError, "window 0 over a state of group windowed0, which keeps 8"),
    (lambda: attending(a=LONE, window=9), {}, GraphError, "window 9 over a state"),
    (lambda: attending(a=SLIDING, b=SLIDING | {"window": 9}), {}, GraphError, r"windowed1 \(window 8\), windowed1 \("),
    (lambda: attending(a=PAGED, b=PAGED | {"group": "slots0"}), {}, GraphError, "share a number: paged0"),
    (lambda: attending(a=LONE, window=8), {}, CheckpointError, "weights lack table"),
    (lambda: small(kv=state("paged1")), {}, GraphError, r"paged1 \(window 0\); number them from 0"),
    (lambda: small(kv=state("paged0"), w=state("windowed0", window=5)), {}, GraphError, "number them from 0"),
    (lambda: small(kv=state("windowed0", window=-5)), {}, GraphError, "group"),
    (lambda: small(kv=state("windowed0", window="x")), {}, GraphError, "group"),
    (lambda: small(kv=state("paged\u0663")), {}, GraphError, "group"),
    (lambda: small(kv=state("paged0", heads="T")), {}, GraphError, "group"),
    (lambda: small(kv=state("paged0", heads=0)), {}, GraphError, "group"),
    (with_state, {5: TABLE, "table": TABLE}, CheckpointError, "weights hold 5"),
    (with_state, {"table": torch.zeros(9, 4).to_sparse()}, CheckpointError, "dense array"),
    (with_state, {"table": torch.zeros(9, 4, device="meta")}, CheckpointError, "dense array"),
    (lambda: None, {"table": TABLE}, OptionError, "graph is a NoneType, expected a Graph"),
    (with_state, None, OptionError, "weights is a NoneType, expected a Mapping"),
    (with_state, {}, CheckpointError, "weights lack table"),
    (with_state, {"table": TABLE, "more": TABLE}, CheckpointError, "weights hold more"),
    (with_state, {"table": TABLE.T}, CheckpointError, r"weight 'table' is torch.float32\[4, 9\], not f32\[9,4\]"),
    (with_state, {"table": TABLE.astype(np.int32)}, CheckpointError, "torch.int32"),
    (with_state, {"table": "text"}, CheckpointError, "weight 'table' is no array"),
]


@pytest.mark.parametrize(("graph", "arrays", "error", "said"), WRONG)
def test_what_does_not_fit_is_refused_before_any_work(
    graph: Callable[[], Any], arrays: Any, error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        penstock.compile(graph(), arrays, PROFILE, device="cpu", cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_options_are_checked(tmp_path: Path) -> None:
    where = {"device": "cpu", "cache_dir": tmp_path}
    with pytest.raises(OptionError, match=r"eos=\[9\] holds 9, which is no token id from 0 to 8"):
        penstock.compile(with_state(), {"table": TABLE}, PROFILE, eos=[9], **where)
    for eos in ([True], None, 5):
        with pytest.raises(OptionError, match="eos"):
            penstock.compile(with_state(), {"table": TABLE}, PROFILE, eos=eos, **where)  # type: ignore[arg-type]
    for wrong in ({"tokenizer": tmp_path}, {"tokenizer": 5}, {"tactics": 5}, {"plugins": 5}, {"output": 5}):
        with pytest.raises(OptionError, match=r"no tokenizer file|no path|tactics is a int|no list of modules"):
            penstock.compile(with_state(), {"table": TABLE}, PROFILE, **{**where, **wrong})
    with pytest.raises(PluginError, match="no_such_plugin"):
        penstock.compile(with_state(), {"table": TABLE}, PROFILE, plugins=["no_such_plugin"], **where)
    with pytest.raises(TypeError, match="unexpected keyword"):
        penstock.compile(with_state(), {"table": TABLE}, PROFILE, magic=1, **where)
