"""Looking into steps: the values that graph.txt names, as the references compute them, and the same text as ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from penstock import LLM, SamplingParams
from penstock.engine import store
from penstock.errors import OptionError
from penstock.ir.interpret import run_node
from penstock.runtime.values import Watch, names_of

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPT = {"prompt_token_ids": [5, 9, 2, 7]}


@pytest.fixture(scope="module")
def llm(tiny_engine: Path) -> Iterator[LLM]:
    with LLM(tiny_engine, device="cpu", skip_tokenizer_init=True) as model:
        yield model


def said(llm: LLM) -> tuple[int, ...]:
    return llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids


def test_the_text_is_the_same_and_the_logits_are_those_it_was_chosen_from(llm: LLM) -> None:
    plain = said(llm)
    watch = llm.watch(["logits", "sampled"], 3)
    assert said(llm) == plain == said(llm)
    by_key = {seen.key: seen for seen in watch.seen}
    logits = [seen.tensor for seen in watch.seen if "logits" in seen.name.results]
    sampled = [seen.tensor for seen in watch.seen if "sampled" in seen.name.results]
    assert [x.argmax(-1).tolist() for x in logits] == [x.tolist() for x in sampled] == [[t] for t in plain[:3]]
    assert {seen.step for seen in watch.seen} == {0, 1, 2} and len(by_key) == 6


def test_only_the_steps_that_were_asked_for_run_node_by_node(llm: LLM) -> None:
    backend = llm._loop.executor.backend
    llm.watch(["logits"], 2)
    assert backend.visit is not None
    said(llm)
    assert backend.visit is None


def test_a_value_is_what_its_node_makes_of_the_values_before_it(llm: LLM) -> None:
    """The names are those of the printed graph: a node's dumped result is its op on its dumped inputs."""
    watch = llm.watch(["forward/*"])
    said(llm)
    phase = llm.engine.programs["decode"].phases["forward"]
    nodes, seen = phase.graph.nodes, {each.name.number: each.tensor for each in watch.seen}
    checked = 0
    for index, node in enumerate(nodes):
        numbers = [f"%{nodes.index(v.node)}" + (f".{v.index}" if v.index else "") for v in node.inputs]
        if node.op in ("add", "glu", "split", "rms_norm", "add_rms_norm") and all(n in seen for n in numbers):
            (wanted, *_) = run_node(node, [seen[n] for n in numbers], {})
            assert torch.equal(seen[f"%{index}"], wanted), node.op
            checked += 1
        elif node.op == "take_rows":
            assert len(seen[f"%{index}"]) == 1
    printed = (llm.engine_dir / store.GRAPH).read_text().split("# phase forward, as it runs\n")[1].splitlines()
    for each in watch.seen:
        line = printed[int(each.name.number[1:].split(".")[0])]
        assert line.startswith(each.name.number.split(".")[0] + " = " + each.name.op + "(")
    assert checked or any("norm" in node.op for node in nodes)


def test_the_file_holds_what_was_seen(llm: LLM, tmp_path: Path) -> None:
    watch = llm.watch(["logits", "sample/*"], 2)
    said(llm)
    with pytest.raises(OptionError, match=r"there is no directory .*deep"):
        watch.save(tmp_path / "deep" / "nodes.safetensors")
    watch.save(tmp_path / "nodes.safetensors")
    with safe_open(tmp_path / "nodes.safetensors", "pt") as file:
        assert set(file.keys()) == {seen.key for seen in watch.seen}
        for seen in watch.seen:
            assert torch.equal(file.get_tensor(seen.key), seen.tensor)
            assert seen.name.op in file.metadata()[seen.key]


def test_a_name_that_nothing_has_is_answered_with_near_ones(llm: LLM) -> None:
    with pytest.raises(OptionError, match=r"'logitz'.*logits"):
        llm.watch(["logits", "logitz"])
    with pytest.raises(OptionError, match=r"inspect ENGINE --graph"):
        llm.watch(["backward/*"])
    with pytest.raises(OptionError, match="at least 1"):
        llm.watch(["logits"], 0)
    assert llm._loop.executor.backend.visit is None


def test_what_is_not_computed_is_answered_with_where_it_is(llm: LLM) -> None:
    """Every leaf, by both spellings of its number: what is suggested can be watched, and is not what was refused."""
    kinds = set()
    for phase_name, phase in llm.engine.programs["decode"].phases.items():
        for index, node in enumerate(phase.graph.nodes):
            if not node.is_leaf:
                continue
            with pytest.raises(OptionError) as caught:
                Watch(llm.engine, [f"{phase_name}/%{index}"])
            told = str(caught.value)
            assert told.startswith(f"{phase_name}/%{index} is the {node.op} {node.name!r}")
            kinds.add(node.op)
            if "called " in told:
                names = told.rsplit("called ", 1)[1].split(" and ")
                assert f"{phase_name}/%{index}" not in names and len(Watch(llm.engine, names)._chosen) == len(names)
            else:
                assert "same in every step" in told if node.op == "weight" else node.name == "upload"
    assert kinds == {"input", "weight", "state"}
    with pytest.raises(OptionError, match=r"'slots' is as large .* by number alone: .*/%"):
        Watch(llm.engine, ["slots"])


def test_a_state_is_seen_only_by_its_own_number(llm: LLM) -> None:
    """A pattern over all would copy the whole KV pool."""
    states = [name for name in names_of(llm.engine).values() if name.state]
    assert states
    watch = Watch(llm.engine, ["*"])
    assert not any(name.state for name in watch._chosen.values())
    assert [n.full for n in Watch(llm.engine, [states[0].full])._chosen.values()] == [states[0].full]


def test_facts_count_what_is_no_number(llm: LLM) -> None:
    watch = llm.watch(["logits"])
    said(llm)
    (seen,) = watch.seen
    seen.tensor[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    facts = seen.facts()
    assert (facts["nan"], facts["inf"]) == (1, 2)
    seen.tensor[:] = torch.nan
    assert seen.facts()["max"] is None and seen.facts()["nan"] == seen.tensor.numel()
