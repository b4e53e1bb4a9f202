"""A package registers every kind of part: found, built with, on record, needed again, refused where it must be."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from penstock import LLM, SamplingParams, plugins
from penstock.cli import main
from penstock.compiler import pipeline
from penstock.compiler.workers import Worker
from penstock.engine import store
from penstock.engine.device import H200
from penstock.engine.match import mismatch
from penstock.errors import GraphError, ModelError, OptionError, PassError, PinError, PluginError, SelectionError
from penstock.formats import known
from penstock.ir.graph import tensor
from penstock.ir.op import vocabulary
from penstock.kernels import calls, layouts, registry
from penstock.kernels.tactic import KernelUse
from penstock.runtime import ModelRunner
from tests.cpu.plugins import package
from tests.cpu.plugins.package import NAME
from tests.kernels.cases.small import site

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": ids} for ids in ([5, 6, 7], [9] * 20)]
LIMITS = {"device": "cpu", "max_batch_size": 2, "max_num_tokens": 24}
PARTS = {
    "call": ["every_kind.product"], "family": ["plugged"], "layout": ["every_kind.flipped"], "op": ["plugged_glu"],
    "pass": ["plug"], "tactic": ["linear=flipped"],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """On the search path; what is loaded from it is forgotten afterwards."""
    place, before = tmp_path / "site", set(plugins.shared())
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))
    yield place
    for module in set(plugins.shared()) - before:
        plugins.unload(module)


@pytest.fixture
def plugged_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny Llama under an architecture that only the plugin reads."""
    target = Path(shutil.copytree(tiny_model, tmp_path / "plugged"))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(
        json.dumps(config | {"architectures": ["PluggedForCausalLM"], "model_type": "plugged"})
    )
    return target


def tokens(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]


def test_an_installed_package_brings_every_kind(
    folder: Path, tiny_model: Path, plugged_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LLM(tiny_model, cache_dir=tmp_path, **LIMITS) as llm:
        want = tokens(llm)
    package.install(folder)
    pins = {"linear": "flipped"}
    with LLM(plugged_model, cache_dir=tmp_path, tactics=pins, **LIMITS) as llm:
        assert tokens(llm) == want
        engine, place = llm.engine, llm.save_engine(tmp_path / "engine")
    assert engine.plugins[NAME]["parts"] == PARTS and engine.plugins[NAME]["version"] == "1.2"
    (kept,) = (tmp_path / "timings").glob("*.json")
    foreign = [key for key in json.loads(kept.read_text()) if key.startswith("plugged_glu(") or "| flipped" in key]
    assert len(foreign) > 1 and all(" every_kind 1.2 " in key for key in foreign)
    assert main(["inspect", str(place)]) == 0
    said = capsys.readouterr().out
    assert "(plugin every_kind)" in said and "flipped (plugin every_kind)" in said
    assert f"every_kind 1.2 ({engine.plugins[NAME]['sources']}): call every_kind.product, family plugged" in said
    with LLM(plugged_model, cache_dir=tmp_path, kv_cache_dtype="fp8_e5m2", **LIMITS) as llm:
        assert llm.engine.kv_format == "fp8_e5m2" and llm.engine.plugins[NAME]["parts"]["format"] == ["fp8_e5m2"]
        assert all(len(each) == 16 for each in tokens(llm))

    plugins.unload(NAME)  # the engine finds what is installed by itself, and with it its weights
    with ModelRunner.from_dir(place) as runner:
        assert len(runner.generate(["a"], 3)) == 1
    plugins.unload(NAME)
    shutil.rmtree(folder)
    folder.mkdir()
    importlib.invalidate_caches()
    for opened in (lambda: store.load(place), lambda: LLM(place, device="cpu")):
        with pytest.raises(PluginError, match=r"needs plugin every_kind 1\.2 for its call .* --plugin every_kind"):
            opened()
    assert main(["inspect", str(place)]) == 2


def test_another_version_is_other_software(folder: Path, plugged_model: Path, tmp_path: Path) -> None:
    package.install(folder)
    with LLM(plugged_model, cache_dir=tmp_path, **LIMITS) as llm:
        want, engine, first = tokens(llm), llm.engine, llm.engine_dir
    assert mismatch(engine, engine.device, engine.software) is None
    plugins.unload(NAME)
    (folder / NAME / "parts.py").write_text(package.PARTS + "\nONE_LINE_MORE = True\n")
    shutil.rmtree(folder / f"{NAME}-1.2.dist-info")
    package.register(folder, NAME, "1.3")
    importlib.invalidate_caches()
    said: list[str] = []
    with LLM(first, cache_dir=tmp_path, device="cpu", progress=lambda stage, *_: said.append(stage)) as llm:
        assert tokens(llm) == want and llm.engine.plugins[NAME]["version"] == "1.3"
        assert llm.engine.plugins[NAME]["parts"]["family"] == ["plugged"]
    why = next(stage for stage in said if stage.startswith("selecting tactics anew"))
    assert "plugin every_kind 1.2" in why and "this is 1.3" in why
    with LLM(plugged_model, cache_dir=tmp_path, **LIMITS) as llm:  # its sources are in the key
        assert llm.engine_dir != first


def test_a_module_is_loaded_by_name(folder: Path, plugged_model: Path, tmp_path: Path) -> None:
    package.install(folder, entry=False)
    common = ["--device", "cpu", "--cache_dir", str(tmp_path), "--max_batch_size", "2", "--max_num_tokens", "24"]
    assert main(["build", "--checkpoint_dir", str(plugged_model), *common]) == 1  # unknown architecture
    words = ["--checkpoint_dir", str(plugged_model), "--output_dir", str(tmp_path / "out"), "--plugin", NAME]
    assert main(["build", *words, *common]) == 0
    assert set(store.load(tmp_path / "out").plugins) == {NAME}
    plugins.unload(NAME)
    for verb in ("inspect", "profile"):
        assert main([verb, str(tmp_path / "out")]) == 2  # not installed, so not found by itself
        assert main([verb, str(tmp_path / "out"), "--plugin", NAME]) == 0
        plugins.unload(NAME)
    with LLM(tmp_path / "out", plugins=[NAME], device="cpu") as llm:
        assert llm.engine.plugins[NAME]["version"] == ""
    plugins.load([NAME])  # a second time is none
    assert plugins.shared().count(NAME) == 1


CONFLICTS = [
    ("op", "from penstock.ir.op import op\n@op(lambda x: x)\ndef rms_norm(x): return x"),
    ("op", "from penstock.ir import emit\nfrom penstock.ir.op import fused\n@fused()\ndef add(x): return (x,)"),
    ("format", "from penstock.formats import Format, register\nregister(Format('bf16', 8, 'u', 'u', 'U8', False))"),
    ("tolerance", "from penstock.formats import F32, tolerance\ntolerance.register(F32, tolerance.Tolerance(1, 1, 1))"),
    ("layout", "from penstock.kernels import layouts as x\nx.register('plain', x.Layout(lambda w: w, lambda w: w))"),
    ("call", "from penstock.kernels import calls\ncalls.register('cublas', print)"),
    ("pass", "from penstock.compiler import pipeline as p\np.register(p.Pass('fold', ()), after='share')"),
    ("tactic", "from penstock.kernels import registry\nfrom penstock.kernels.linear.cublas import *\n"
               "registry.register(next(t for t in registry.tactics('linear') if t.name == 'cublas'))"),
    ("family", "from penstock.models import Family, register\nregister(Family('gemma', ('G',), print, print))"),
]  # fmt: skip


def registered() -> list[Any]:
    names = [op.name for op in vocabulary()]
    return [names, known(), sorted(layouts.known()), sorted(calls.CALLS), [p.name for p in pipeline.passes()],
            [(t.op, t.name) for name in names for t in registry.tactics(name)]]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), CONFLICTS, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(CONFLICTS)])
def test_a_name_of_ours_is_refused_and_nothing_stays(kind: str, text: str, folder: Path) -> None:
    registry.builtin()
    before, first = registered(), "from penstock.ir.op import op\n@op(lambda x: x)\ndef came_first(x): return x\n"
    (folder / "conflicting.py").write_text(first + text)
    with pytest.raises(PluginError, match=rf"--plugin 'conflicting': {kind} '.*' is registered by penstock itself"):
        plugins.load(["conflicting"])
    assert registered() == before and "conflicting" not in plugins.identities()


def test_two_plugins_with_one_name(folder: Path) -> None:
    for name in ("one", "other"):
        (folder / f"{name}.py").write_text("from penstock.ir.op import op\n@op(lambda x: x)\ndef shared(x): return x")
    with pytest.raises(PluginError, match=r"--plugin 'other': op 'shared' is registered by plugin one already"):
        plugins.load(["one", "other"])
    assert plugins.owner("op", "shared") == "one"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("1 / 0", "ZeroDivisionError"),
        ("def (", "SyntaxError"),
        (CONFLICTS[0][1].replace("rms_norm", "mine") + "\nraise RuntimeError('halfway')", "RuntimeError: halfway"),
        ("from penstock.compiler import pipeline as p\np.register(p.Pass('new', ()), after='nothing')", "'nothing'"),
        ("from penstock.kernels import registry, tactic\nclass T(tactic.Tactic):\n  op, name = 'nothing', 'x'\n"
         "  def supports(self, *_): ...\n  def plan(self, *_): ...\nregistry.register(T())", "unknown op 'nothing'"),
    ],
)  # fmt: skip
def test_a_plugin_that_fails_is_named(text: str, said: str, folder: Path, tiny_model: Path) -> None:
    before = registered()
    (folder / "broken_plugin.py").write_text(text)
    package.register(folder, "broken_plugin")
    for start in (lambda: plugins.load(), lambda: LLM(tiny_model, device="cpu")):
        with pytest.raises(PluginError, match=f"(?s)plugin 'broken_plugin', entry point 'its_name',.*{said}"):
            start()
    assert registered() == before
    (folder / "broken_plugin.py").write_text("MENDED = True")
    importlib.invalidate_caches()
    plugins.load()
    assert "broken_plugin" in plugins.shared()


TACTIC = (
    "from penstock.kernels import calls, registry\nfrom penstock.kernels.tactic import Draft, Tactic, whole_call\n"
    "class T(Tactic):\n  op, name = 'add', 'mine'\n"
)
RIGHT = "  def supports(self, *_): return None\n"
CALLED = f"{TACTIC}{RIGHT}  def plan(self, site, *_): return Draft((whole_call('mine.call', site),))\n"
LIES = [
    (TACTIC + "  def supports(self, *_): 1 / 0\n  def plan(self, *_): ...\n", "ZeroDivisionError"),
    (TACTIC + RIGHT + "  def plan(self, *_): 1 / 0\n", "ZeroDivisionError"),
    (TACTIC + RIGHT + "  def plan(self, *_): ...\n", "a plan of None"),
    (TACTIC + RIGHT + "  def plan(self, *_): return Draft((5,))\n", "not a Draft of calls and kernels"),
    (CALLED + "calls.register('mine.call', lambda c, given, *_: 1 / 0)\n", "ZeroDivisionError"),
    (CALLED + "calls.register('mine.call', lambda c, given, *_: exit(3))\n", "SystemExit: 3"),
    (CALLED + "calls.register('mine.call', lambda c, given, *_: None)\n", "TypeError"),
    (CALLED + "calls.register('mine.call', lambda c, given, *_: ((given[0] + given[1])[:1, :1],))\n",
     "result 0 is torch.float32"),
    (CALLED + "calls.register('mine.call', lambda c, given, *_: ((given[0] + given[1]).double(),))\n",
     "torch.float64"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), LIES)
def test_a_tactic_that_breaks_or_lies_is_out_and_on_record(
    text: str, said: str, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (folder / "lying.py").write_text(text + "registry.register(T())\n")
    with pytest.raises((SelectionError, PinError), match=f"mine.*{said}"):
        LLM(tiny_model, plugins=["lying"], tactics={"add": "mine"}, cache_dir=tmp_path, **LIMITS)


RULED = "from penstock.compiler import pipeline as p\nfrom penstock.ir import emit\nfrom penstock.ir.op import op\n"
PUT = "\np.register(p.Pass('broken', (rule,)), after='fold')\n"
SWAP = "\ndef rule(m): return {m.node[0]: emit('mine', *m.node.inputs)[0]} if m.node.op == 'add' else None\n"
BROKEN = [
    (RULED + "def rule(m): 1 / 0" + PUT, PluginError, "pass 'broken' of plugin broken_part failed: ZeroDivisionError"),
    (RULED + "def rule(m): return 5" + PUT, PluginError, "pass 'broken' of plugin broken_part failed: TypeError"),
    (RULED + "def rule(m): return {m.node[0]: emit('add', m.node[0], m.node[0])[0]} if m.node.op == 'add' else None"
     + PUT, PassError, "replaced by one that reads it"),
    (RULED + "def rule(m): return {m.node[0]: emit('add', emit('add', *m.node.inputs)[0], m.node.inputs[1])[0]} "
     "if m.node.op == 'add' else None" + PUT, PassError, "rules made more than"),
    (RULED + "@op(lambda *_: {}['x'])\ndef mine(x, y): return x" + SWAP + PUT, GraphError, "mine"),
    (RULED + "@op(lambda x, y: x)\ndef mine(x, y): return x[:, :1]" + SWAP + PUT, SelectionError, "type rule"),
    (RULED + "@op(lambda x, y: x)\ndef mine(x, y): return None" + SWAP + PUT, SelectionError, "no tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "error", "said"), BROKEN)
def test_a_rule_or_an_op_that_breaks_is_named(
    text: str, error: type[Exception], said: str, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (folder / "broken_part.py").write_text(text)
    with pytest.raises(error, match=said):
        LLM(tiny_model, plugins=["broken_part"], cache_dir=tmp_path, **LIMITS)


FAMILY = "from penstock.models import Family, family_of, register\nl = family_of({'model_type': 'llama'})\n"
FAMILIES = [
    ("lambda r: {}['x'], l.source", "family 'plugged' of plugin broken_family failed: KeyError"),
    ("l.read, lambda w: None", "family 'plugged' of plugin broken_family failed: AttributeError"),
    ("lambda r: l.read(r) and None, l.source", "reads a NoneType|reads the config as a NoneType"),
    ("l.read, l.source, ('(',)", "cannot be imported"),
]


@pytest.mark.parametrize(("facts", "said"), FAMILIES)
def test_a_family_that_breaks_is_named(
    facts: str, said: str, folder: Path, plugged_model: Path, tmp_path: Path
) -> None:
    (folder / "broken_family.py").write_text(f"{FAMILY}register(Family('plugged', ('PluggedForCausalLM',), {facts}))")
    with pytest.raises((PluginError, ModelError), match=said):
        LLM(plugged_model, plugins=["broken_family"], cache_dir=tmp_path, **LIMITS)


@pytest.mark.parametrize("end", ["raise SystemExit(0)", "raise KeyboardInterrupt"])
def test_a_plugin_that_ends_the_program_leaves_nothing(end: str, folder: Path) -> None:
    before = registered()
    (folder / "ending.py").write_text(f"from penstock.ir.op import op\n@op(lambda x: x)\ndef mine(x): return x\n{end}")
    with pytest.raises((PluginError, KeyboardInterrupt)):
        plugins.load(["ending"])
    assert registered() == before


@pytest.mark.parametrize("names", ["a.b", 5, [1], ["not a name"], [""]])
def test_what_names_no_module_is_refused(names: Any) -> None:
    with pytest.raises(OptionError, match="give one like"):
        plugins.load(names)


def test_rules_of_two_plugins_stand_in_their_places(folder: Path) -> None:
    text = "from penstock.compiler import pipeline as p\n"
    for name, after in (("first", "fuse_norm"), ("second", "fuse_norm"), ("third", "first")):
        (folder / f"pass_{name}.py").write_text(text + f"p.register(p.Pass('{name}', ()), after='{after}')")
    plugins.load(["pass_first", "pass_second", "pass_third"])
    names = [step.name for step in pipeline.passes()]
    assert names[names.index("fuse_norm") :][:5] == ["fuse_norm", "first", "third", "second", "fuse_rope"]
    assert [step for step in pipeline.passes() if step in pipeline.PASSES] == list(pipeline.PASSES)


def test_worker_processes_load_the_same(folder: Path, tmp_path: Path) -> None:
    """The package is on this process's search path alone; its kernel is compiled in the other one."""
    package.install(folder)
    plugins.load()
    x = tensor("f32", "T", 128)
    (use,) = registry.tactics("plugged_glu")[0].plan(site("plugged_glu", x, x), {"T": 1}, H200, {}).steps
    assert isinstance(use, KernelUse)
    job = {"do": "compile", "kernel": asdict(use.kernel), "capability": 90}
    with closing(Worker(tmp_path, {"do": "none"})) as worker:
        assert worker.ask(job) == {"key": use.kernel.key(90)}
    assert (tmp_path / f"{use.kernel.key(90)}.cubin").stat().st_size
    (folder / NAME / "parts.py").write_text("raise RuntimeError('other process')")
    with closing(Worker(tmp_path, {"do": "none"})) as worker:
        refused = worker.ask(job)["refused"]
    assert "PluginError: --plugin 'every_kind' cannot be imported: RuntimeError: other process" in refused


def test_what_was_only_imported_is_known_there_too_and_a_script_is_told(folder: Path) -> None:
    register = "from penstock.ir.op import op\n@op(lambda x: x)\ndef {}(x): return x"
    (folder / "only_imported.py").write_text(register.format("imported"))
    importlib.import_module("only_imported")
    assert "only_imported" in plugins.shared()
    known = set(plugins._NOTES)
    try:
        exec(register.format("scripted"), {"__name__": "__main__"})
        with pytest.raises(PluginError, match="op 'scripted' is registered by the script that runs"):
            plugins.shared()
    finally:
        plugins._take_back(known, "nobody")
    assert "__main__" not in plugins.shared()


def test_a_tactic_alone_is_not_needed_to_run(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    (folder / "tactic_only.py").write_text(
        "from penstock.kernels import registry\nfrom penstock.kernels.tactic import Draft, Tactic, whole_call\n"
        "class T(Tactic):\n  op, name = 'add', 'mine'\n  def supports(self, *_): return None\n"
        "  def plan(self, site, *_): return Draft((whole_call('reference', site),))\nregistry.register(T())"
    )
    with LLM(tiny_model, plugins=["tactic_only"], tactics={"add": "mine"}, cache_dir=tmp_path, **LIMITS) as llm:
        want, place, recorded = tokens(llm), llm.engine_dir, llm.engine.plugins
    assert recorded["tactic_only"]["parts"] == {"tactic": ["add=mine"]}
    plugins.unload("tactic_only")
    with LLM(place, device="cpu") as llm:
        assert tokens(llm) == want
