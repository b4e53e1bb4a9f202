"""The command line end to end on a tiny model: results on stdout, talk on stderr, exit codes, both flag spellings."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from penstock.cli import main
from penstock.cli.demo import _distance, token_cost
from penstock.cli.inspect_nodes import shortened
from penstock.engine import store
from penstock.kernels.roof import Roof
from penstock.runtime.requests import CompletionOutput, RequestMetrics, RequestOutput
from penstock.text import ChatTemplate
from tests.cpu import tiny

LIMITS = ["--max_batch_size", "4", "--max_num_tokens", "24", "--device", "cpu"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def one(*args: object) -> Ran:
        capsys.readouterr()
        code = main([str(a) for a in args])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return one


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny.write(tmp_path_factory.mktemp("cli") / "model")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli-engine")
    target = directory / "engine"
    args = ["build", "--checkpoint_dir", model, "--output_dir", target, "--cache_dir", directory / "cache", *LIMITS]
    assert main([str(a) for a in args]) == 0
    return target


def test_build_prints_the_engine_alone_and_then_finds_it(run: Run, model: Path, engine: Path) -> None:
    ran = run(
        "build", "--checkpoint-dir", model, "--output-dir", engine, "--cache-dir", engine.parent / "cache", "--verify",
        *(word.replace("_", "-") for word in LIMITS),
    )  # fmt: skip
    assert (ran.code, ran.out) == (0, f"{engine}\n")
    assert "cached" in ran.err and "select" not in ran.err and "verified" in ran.err
    ran = run("build", "--checkpoint_dir", model, "--output_dir", engine, "--json", *LIMITS)
    assert ran.data["cached"] is True and ran.data["profile"]["max_batch_size"] == 4


def test_verify_finds_weights_that_changed_behind_the_same_key(
    run: Run, model: Path, engine: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(engine, tmp_path / "engine")
    file = own / store.weights_file()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    args = ("build", "--checkpoint_dir", model, "--output_dir", own, *LIMITS)
    assert run(*args).code == 0
    ran = run(*args, "--verify")
    assert ran.code == 1 and "is not what" in ran.err


def test_the_classic_flags_mean_what_they_say(run: Run, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "engine"
    ran = run(
        "build", "--checkpoint_dir", model, "--output_dir", target, "--cache_dir", tmp_path / "cache",
        "--gemm_plugin", "disable", "--max_batch_size", 4, "--max_input_len", 100, "--max_seq_len", 200,
        "--paged_kv_cache", "enable", "--use_inflight_batching", "--device", "cpu", "--max_num_tokens", 16,
    )  # fmt: skip
    assert ran.code == 0 and ran.err.count("--") >= 3  # each of the three says what it means
    profile = store.load(target).profile
    assert (profile.max_batch_size, profile.max_seq_len, profile.max_num_tokens) == (4, 200, 16)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("build --nonsense 3", 2, "--nonsense"),
        ("build --max_batch_size many", 2, "--max_batch_size"),
        ("build --checkpoint_dir {model} --max_batch_size 0 --device cpu", 2, "max_batch_size=0"),
        ("build --checkpoint_dir {model} --max_seq_len 300 --device cpu", 2, "256 positions"),
        ("build --checkpoint_dir {model} --paged_kv_cache disable", 2, "always paged"),
        ("build --checkpoint_dir {model} --max_input_len 64 --max_seq_len 64", 2, "--max_input_len 64"),
        ("build --checkpoint_dir {model} --gemm_plugin fp8", 2, "fp8 is not built yet"),
        ("build --checkpoint_dir {model} --gemm_plugin int4", 2, "not one of auto"),
        ("build --checkpoint_dir {model} --gemm_plugin float16", 2, "the checkpoint says float32"),
        ("build --checkpoint_dir {model} --gemm_plugin disable --tactic linear=cublas", 2, "drop one"),
        ("build --checkpoint_dir {model} --quant_mode int4_awq", 2, "quant_mode='int4_awq' is not built yet"),
        ("build --checkpoint_dir {model} --tactic linear", 2, "OP=NAME"),
        ("build --checkpoint_dir {model} --tactic linear=a --tactic linear=b", 2, "contradicts linear=a"),
        ("build --checkpoint_dir {model} --tactic linear=magic --device cpu --cache_dir {tmp}", 2, "'magic'"),
        ("build --checkpoint_dir {model} --plugin no_such_module", 2, "no_such_module"),
        ("build --checkpoint_dir {model} --device tpu", 2, "tpu"),
        ("build --checkpoint_dir {tmp} --device cpu", 1, "config.json does not exist"),
        ("build --checkpoint_dir {tmp}/none --device cpu", 1, "no directory"),
        ("inspect {tmp}", 1, "no engine directory"),
        ("inspect {engine} --bandwidth -1", 2, "must be positive"),
        ("run --engine_dir {engine}", 2, "--input_text"),
        ("run --engine_dir {engine} --input_text x --tp_size 8", 2, "tp_size=8 is not built yet"),
        ("run --engine_dir {model} --input_text x", 1, "no engine directory"),
        ("generate {engine} -p x --temperature -1", 2, "temperature=-1"),
        ("generate {engine} --prompt=", 2, "empty"),
        ("refit {engine}", 2, "--checkpoint_dir"),
        ("serve {engine} --port 70000", 2, "port=70000"),
        ("serve {engine} --api_key_file {tmp}/none", 2, "No such file"),
        ("serve {engine} --ssl_certfile {tmp} --ssl_keyfile {tmp}", 2, "ssl_certfile"),
        ("serve {engine} --host 203.0.113.7 --port 0", 2, "cannot be had"),
        ("quantize --qformat int4_awq", 2, "penstock quantize is not built yet"),
        ("bench serve --base_url nowhere", 2, "is no URL like"),
        ("bench latency --lengths 1,x", 2, "no list of numbers"),
        ("bench kernels {tmp}", 1, "no engine directory"),
        ("profile {engine} --batch 99", 2, "--batch 99 is outside 1 to 4"),
        ("profile {tmp}", 1, "no engine directory"),
        ("run --engine_dir {engine} --input_text x --debug_nodes logitz", 2, "near are logits"),
        ("run --engine_dir {engine} --input_text x --max_seq_len 9999", 2, "max_seq_len=9999"),
        ("diff {engine} {engine}", 2, "penstock diff is not built yet"),
        ("unknown", 2, "unknown"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(
    run: Run, model: Path, engine: Path, tmp_path: Path, words: str, code: int, said: str
) -> None:
    ran = run(*words.format(model=model, engine=engine, tmp=tmp_path).split(" "))
    assert (ran.code, ran.out) == (code, "")
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0] and "Traceback" not in ran.err


def test_debug_shows_the_error_itself(run: Run, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no engine directory"):
        run("inspect", tmp_path, "--debug")


def test_an_interrupt_is_130(run: Run, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("penstock.cli.inspect_report.report", interrupted)
    assert run("inspect", engine).code == 130


def test_inspect_tells_every_section(run: Run, engine: Path) -> None:
    ran = run("inspect", engine, "--bandwidth", 100)
    assert ran.code == 0 and ran.err == ""
    wanted = ["2 of 4 heads of 16 over 2 KV heads", "fuse_qkv 2x", "reference", "[torch", "at 100 GB/s", "T tokens"]
    for said in (
        *wanted,
        "block_table 24",
        "dense_block(",
        "where the time of a step of",
        "linear f32[",
    ):
        assert said in ran.out
    assert "# as built" not in ran.out and max(map(len, ran.out.splitlines())) < 200
    assert "of the roof" not in ran.out  # the CPU times a step of several tokens, the roof is of one


def test_inspect_shows_one_part_when_one_is_asked_for(run: Run, engine: Path) -> None:
    nodes, graph = run("inspect", engine, "--nodes").out, run("inspect", engine, "--graph").out
    assert nodes.startswith("operations") and "memory" not in nodes and "# as built" not in nodes
    assert graph.startswith("# as built") and "# after the passes" in graph and "operations" not in graph


def test_inspect_ranks_operations_by_their_share(run: Run, engine: Path) -> None:
    data = run("inspect", engine, "--json").data
    assert sum(n["share"] for n in data["nodes"]) == pytest.approx(1)
    assert sum(n["step_us"] for n in data["nodes"]) == pytest.approx(1e6 * data["roof"]["timed_step_seconds"])
    assert list(dict.fromkeys(n["phase"] for n in data["nodes"])) == ["prepare", "forward", "sample"]
    forward = [n["step_us"] for n in data["nodes"] if n["phase"] == "forward"]
    assert forward == sorted(forward, reverse=True)
    assert data["roof"]["timed_tokens"] > 1 and data["roof"]["share"] is None


def test_long_types_are_counted_and_cut() -> None:
    assert shortened("f(i32[T], i32[T], f32[2]!) : i32[T]") == "f(2*i32[T], f32[2]!) : i32[T]"
    assert shortened("f(f32[2], f32[2]!, f32[2]!)") == "f(f32[2], 2*f32[2]!)"
    assert len(shortened("f(" + ", ".join(f"i32[{i}]" for i in range(99)) + ")")) == 100


def test_inspect_json_adds_up(run: Run, engine: Path) -> None:
    data, manifest = run("inspect", engine, "--json", "--bandwidth", 100).data, store.load(engine)
    assert data["memory"]["weights"] == manifest.weight_bytes
    assert data["memory"]["kv_per_block"] == 64 * data["memory"]["kv_per_token"] == 64 * 2 * 2 * 2 * 16 * 4
    assert data["roof"]["seconds_per_token"] == pytest.approx(manifest.work["weight_bytes"] / 100e9)
    graph = manifest.programs["decode"].phases["forward"].graph
    forward = [n for n in data["nodes"] if n["phase"] == "forward"]
    assert sum(n["count"] for n in forward) == sum(not n.is_leaf for n in graph.nodes)
    block = next(n for n in forward if n["op"] == "dense_block")["choices"][0]
    rivals = {block["tactic"]: block["median_us"], **{r["tactic"]: r["median_us"] for r in block["runners_up"]}}
    assert set(rivals) == {"parts", "reference"} and block["median_us"] == min(rivals.values())


def test_inspect_refuses_a_changed_engine(run: Run, engine: Path, tmp_path: Path) -> None:
    own = shutil.copytree(engine, tmp_path / "engine")
    (own / store.TIMING).write_text("{}")
    ran = run("inspect", own)
    assert ran.code == 1 and store.TIMING in ran.err


def test_check_adds_up_and_its_verdict_is_the_exit_code(run: Run, model: Path, engine: Path) -> None:
    ran = run("check", model, *LIMITS, "--json")
    memory, manifest = ran.data["memory"], store.load(engine)
    assert ran.code == 0 and ran.data["fits"] is True
    assert memory["weights"] == manifest.weight_bytes and memory["kv_per_request"] == 4 * manifest.block_bytes
    ran = run("check", model, *LIMITS, "--memory_gb", 0.0001)
    assert ran.code == 1 and "does not fit" in ran.out
    ran = run("check", model, "--device", "h200", "--dtype", "bfloat16", "--json")
    assert ran.code == 0 and ran.data["references"] == {} and ran.data["format"] == "bf16"


def test_check_counts_the_parameters_of_the_bundled_model(run: Run) -> None:
    data = run("check", "--device", "h200", "--json").data
    assert data["model"]["parameters"] == 4_590_848  # as results.json says; the head is tied, rope's are computed


def test_check_reads_a_converted_checkpoint(run: Run, model: Path, tmp_path: Path) -> None:
    ran = run("convert", "--model_dir", model, "--output_dir", tmp_path / "c", "--dtype", "float32", "--tp_size", 2)
    assert ran.code == 0 and "wrote 2 files of weights" in ran.err
    assert f"next: penstock build --checkpoint_dir {tmp_path / 'c'}\n" in ran.err
    facts = [run("check", path, *LIMITS, "--json").data for path in (tmp_path / "c", model)]
    assert facts[0]["memory"]["weights"] == facts[1]["memory"]["weights"] and facts[0]["fits"] is True
    assert [f["model"]["parameters"] for f in facts] == [facts[1]["model"]["parameters"]] * 2


def test_check_answers_for_an_engine_from_its_manifest(run: Run, engine: Path) -> None:
    ran, manifest = run("check", engine, "--device", "cpu", "--json"), store.load(engine)
    assert ran.code == 0 and ran.data["fits"] is True and ran.data["mismatch"] is None
    assert ran.data["memory"]["weights"] == manifest.weight_bytes
    assert "fits: the engine was made for this device" in run("check", engine, "--device", "cpu").out
    other = run("check", engine, "--device", "h200")
    assert other.code == 1 and "compiled for a CPU, and this is NVIDIA H200" in other.out
    small = run("check", engine, "--device", "cpu", "--memory_gb", 0.0001)
    assert small.code == 1 and "does not fit" in small.out
    beyond = run("check", engine, "--device", "cpu", "--max_seq_len", 4096)
    assert beyond.code == 2 and "--max_seq_len 4096" in beyond.err


def test_a_build_over_an_engine_says_that_it_is_replaced(run: Run, model: Path, engine: Path, tmp_path: Path) -> None:
    own = shutil.copytree(engine, tmp_path / "engine")
    args = ("build", "--checkpoint_dir", model, "--output_dir", own, "--cache_dir", engine.parent / "cache")
    ran = run(*args, *LIMITS[2:], "--max_batch_size", 2)
    assert ran.code == 0 and "replaced" in ran.err and store.load(own).profile.max_batch_size == 2
    assert "replaced" not in run(*args[:3], "--output_dir", tmp_path / "new", *args[5:], *LIMITS).err


def test_check_renders_what_is_not_supported(run: Run, model: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange"
    shutil.copytree(model, strange)
    config = json.loads((strange / "config.json").read_text()) | {"mystery": 3}
    (strange / "config.json").write_text(json.dumps(config))
    ran = run("check", strange, "--device", "cpu", "--json")
    assert ran.code == 1 and ran.data["error"] == "ConfigError" and "mystery" in ran.data["verdict"]


def test_generate_streams_the_text_that_json_prints(run: Run, engine: Path) -> None:
    args = ("generate", engine, "-p", "In the beginning", "--max-tokens", 6, "--temperature", 0)
    plain, data = run(*args), run(*args, "--json").data
    assert plain.code == 0 and plain.out == data["text"] + "\n"
    assert len(data["token_ids"]) == 6 and data["finish_reason"] == "length"
    assert "top_p=1.0 (default)" in plain.err and "temperature" not in plain.err and "tok/s" in plain.err


def test_generate_takes_its_prompt_from_a_pipe(run: Run, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("A tuple is"))
    data = run("generate", engine, "--max_tokens", 2, "--seed", 5, "--json").data
    assert data["prompt"] == "A tuple is" and len(data["token_ids"]) == 2


def test_a_seed_repeats_and_another_does_not(run: Run, engine: Path) -> None:
    texts = [run("generate", engine, "-p", "God", "--max_tokens", 12, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_run_prints_each_input_with_its_output(run: Run, engine: Path) -> None:
    args = ("--input_text", "In the", "--input-text", "A tuple", "--max_output_len", 4, "--temperature", 0)
    ran = run("run", "--engine_dir", engine, *args)
    data = run("run", "--engine_dir", engine, *args, "--json").data
    assert ran.code == 0 and [d["input_text"] for d in data] == ["In the", "A tuple"]
    for index, each in enumerate(data):
        assert f'Output [Text {index} Beam 0]: "{each["text"]}"' in ran.out and len(each["token_ids"]) == 4
    alone = run("generate", engine, "-p", "A tuple", "--max_tokens", 4, "--temperature", 0, "--json").data
    assert alone["token_ids"] == data[1]["token_ids"]


def test_chat_answers_each_line_of_a_pipe_with_the_history(
    run: Run, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[dict[str, str]]] = []
    render = ChatTemplate.render

    def noted(self: ChatTemplate, messages: Any, *args: Any, **more: Any) -> str:
        asked.append([dict(m) for m in messages])
        return render(self, messages, *args, **more)

    monkeypatch.setattr(ChatTemplate, "render", noted)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nagain\n"))
    ran = run("chat", engine, "--max_tokens", 3, "--temperature", 0, "--system", "Be brief.")
    assert ran.code == 0 and [[m["role"] for m in messages] for messages in asked] == [
        ["system", "user"], ["system", "user", "assistant", "user"],
    ]  # fmt: skip
    assert asked[1][3]["content"] == "again" and ran.out.startswith(asked[1][2]["content"] + "\n")


def test_chat_without_a_template_is_refused(run: Run, engine: Path, tmp_path: Path, model: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "chat_template.jinja").unlink()
    target = tmp_path / "engine"
    cache = engine.parent / "cache"  # its timings are known, so this build is quick
    assert run("build", "--checkpoint_dir", bare, "--output_dir", target, "--cache_dir", cache, *LIMITS).code == 0
    ran = run("chat", target)
    assert ran.code == 1 and "no chat template" in ran.err


def test_refit_changes_the_text_and_nothing_else(run: Run, engine: Path, tmp_path: Path) -> None:
    other = tiny.write(tmp_path / "other", seed=9)
    target = tmp_path / "refitted"
    ran = run("refit", engine, "--checkpoint_dir", other, "--output_dir", target)
    assert (ran.code, ran.out) == (0, f"{target}\n")
    assert "refitted in a new engine: " in ran.err and f"now of {other}" in ran.err
    args = ("-p", "In the beginning", "--max_tokens", 8, "--temperature", 0, "--json")
    assert run("generate", target, *args).data["token_ids"] != run("generate", engine, *args).data["token_ids"]
    assert (target / store.TIMING).read_text() == (engine / store.TIMING).read_text()


def test_convert_then_build_gives_the_same_text(run: Run, model: Path, engine: Path, tmp_path: Path) -> None:
    checkpoint, target = tmp_path / "checkpoint", tmp_path / "engine"
    assert (
        run("convert", "--model_dir", model, "--output_dir", checkpoint, "--dtype", "float32", "--tp_size", 2).code == 0
    )
    cache = engine.parent / "cache"
    assert run("build", "--checkpoint_dir", checkpoint, "--output_dir", target, "--cache_dir", cache, *LIMITS).code == 0
    args = ("-p", "In the beginning", "--max_tokens", 8, "--temperature", 0, "--json")
    assert run("generate", target, *args).data["token_ids"] == run("generate", engine, *args).data["token_ids"]


def test_demo_shows_stages_text_and_roof(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.bundled.target", lambda: model)
    monkeypatch.setattr("penstock.kernels.roof.CPU_BUFFER", 1 << 20)
    monkeypatch.setattr("penstock.kernels.roof.CPU_SIDE", 64)
    ran = run("demo", "--device", "cpu", "--cache_dir", tmp_path, "--max_tokens", 8)
    assert ran.code == 0 and "In the beginning" in ran.out
    stages = [line.split()[0] for line in ran.out.splitlines() if line.startswith("  ") and len(line.split()) > 2]
    assert [s for s in stages if s in ("read", "select", "weights", "load", "first", "decode")] == [
        "read", "select", "weights", "load", "first", "decode",
    ]  # fmt: skip
    assert "tok/s" in ran.out and "% of it" in ran.out and "Assumed" in ran.out
    again = run("demo", "--device", "cpu", "--cache_dir", tmp_path, "--max_tokens", 8)
    assert "when built" in again.out and "when built" not in ran.out


def test_the_distance_from_the_roof_is_arithmetic(engine: Path) -> None:
    manifest = store.load(engine)
    done = CompletionOutput(0, "x", tuple(range(11)), "length")
    output = RequestOutput("r", "p", (1, 2, 3), (done,), True, RequestMetrics(0.0, 0.5, 0.6))  # 10 tokens in 0.1 s
    read, operations = token_cost(manifest, context=3 + 11 / 2)
    assert read == manifest.work["weight_bytes"] + 8.5 * manifest.work["kv_bytes_per_token"]
    assert operations == manifest.work["flops_per_token"] + manifest.work["flops_per_logit"]
    text = _distance(manifest, Roof(read * 400, operations * 1e6), output)
    assert "at most 400 tok/s" in text and "reached 100.0, 25.0% of it" in text


@pytest.mark.parametrize("word", ["--help", "--version", "build --help", "bench", "bench latency --help"])
def test_asking_for_help_is_quick_and_loads_nothing_heavy(word: str) -> None:
    code = (
        "import sys; from penstock.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'triton', 'numpy', 'tokenizers', 'transformers'} & set(sys.modules)\n"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *word.split()], capture_output=True, text=True)
        taken.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(taken) < 1.0  # 0.25 s on an idle core; the tests share theirs


@pytest.mark.parametrize("what", ["model", "engine"])
def test_check_imports_no_torch(what: str, request: pytest.FixtureRequest) -> None:
    path, device = request.getfixturevalue(what), "h200" if what == "model" else "cpu"
    code = (
        "import sys; from penstock.cli import main; code = main(sys.argv[1:])\n"
        "sys.exit(code or ('torch was imported' if 'torch' in sys.modules else 0))"
    )
    start = time.perf_counter()
    words = [sys.executable, "-c", code, "check", str(path), "--device", device]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert time.perf_counter() - start < 4.0  # 0.6 s on an idle core; the bar is two seconds
