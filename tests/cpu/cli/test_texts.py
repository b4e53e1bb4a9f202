"""Several texts, beams, log-probabilities, penalties and deadlines on the command line."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock import LLM, SamplingParams
from penstock.cli.texts import facts, scores
from penstock.errors import PromptError
from penstock.runtime.requests import CompletionOutput, RequestMetrics, RequestOutput
from tests.cpu.cli.test_cli import engine, model, run

__all__ = ["engine", "model", "run"]  # fixtures
PROMPT = "In the beginning"


@pytest.fixture(scope="module")
def llm(engine: Path) -> Iterator[LLM]:
    with LLM(engine, device="cpu") as llm:
        yield llm


def test_several_texts_stand_one_under_another(run: Any, engine: Path, llm: LLM) -> None:
    args = ("generate", engine, "-p", PROMPT, "--n", 3, "--seed", 5, "--max_tokens", 6)
    plain, data = run(*args), run(*args, "--json").data
    want = llm.generate(PROMPT, SamplingParams(n=3, seed=5, max_tokens=6))[0].outputs
    assert plain.code == 0 and plain.out == "".join(f"[{each.index}]\n{each.text}\n" for each in want)
    assert [each["token_ids"] for each in data["outputs"]] == [list(each.token_ids) for each in want]
    assert data["text"] == want[0].text and len({each.text for each in want}) == 3
    assert "18 generated in 3 texts (length)" in plain.err and data["outputs"][0]["logprobs"] is None


def test_beams_come_with_their_scores(run: Any, engine: Path, llm: LLM) -> None:
    args = ("generate", engine, "-p", PROMPT, "--max_tokens", 6)
    asked: dict[str, Any] = {"use_beam_search": True, "beam_width": 4, "max_tokens": 6}
    want = llm.generate(PROMPT, SamplingParams(n=4, **asked))[0].outputs
    plain = run(*args, "--num_beams", 4)
    assert plain.out == "".join(f"[{each.index}, score {each.score:.4f}]\n{each.text}\n" for each in want)
    assert "24 generated in 4 texts (length); ended after" in plain.err and "sampling:" not in plain.err
    assert run(*args, "--beams", 4, "--n", 1).out == want[0].text + "\n"  # one text stands alone
    data = run(*args, "--beams", 4, "--n", 2, "--length_penalty", 2, "--json").data
    ranked = llm.generate(PROMPT, SamplingParams(n=2, length_penalty=2.0, **asked))[0].outputs
    assert [each["score"] for each in data["outputs"]] == [each.score for each in ranked]
    assert data["outputs"][0]["score"] != want[0].score


def test_one_beam_is_no_search(run: Any, engine: Path) -> None:
    args = ("generate", engine, "-p", PROMPT, "--max_tokens", 6, "--seed", 4)
    assert run(*args, "--beams", 1, "--length_penalty", 1).out == run(*args).out


def test_a_line_for_each_token_that_was_scored(run: Any, engine: Path) -> None:
    args = ("generate", engine, "-p", PROMPT, "--max_tokens", 4, "--seed", 4, "--logprobs")
    data, ran = run(*args, 2, "--json").data, run(*args, 2)
    tokens, table = data["outputs"][0]["logprobs"], ran.out[len(data["text"]) + 1 :].splitlines()
    assert ran.out.startswith(data["text"] + "\n") and table[0].split() == ["token", "logprob", "likeliest"]
    assert [each["token_id"] for each in tokens] == data["token_ids"] and len(table) == 1 + 4
    for each, line in zip(tokens, table[1:], strict=True):
        best = [likely["logprob"] for likely in each["likeliest"]]
        assert f"{each['logprob']:.3f}" in line and best == sorted(best, reverse=True) and len(best) in (2, 3)
        assert each["logprob"] in best
    assert "likeliest" not in run(*args, 0).out
    total = sum(each["logprob"] for each in tokens)
    assert data["outputs"][0]["cumulative_logprob"] == pytest.approx(total)


def test_tokens_are_quoted_and_json_has_no_infinity(llm: LLM) -> None:
    done = CompletionOutput(0, "x", (5, 7), "length", logprobs=({5: -0.5, 7: -2.0}, {7: -float("inf"), 5: -1.0}))
    lines = scores(done, None).splitlines()
    assert lines[1].split() == ["5", "-0.500", "5", "-0.500", "7", "-2.000"]
    assert lines[2].split() == ["7", "-inf", "5", "-1.000", "7", "-inf"]
    assert llm.tokenizer is not None
    newline = llm.tokenizer.encode("\n", add_special_tokens=False)
    quoted = CompletionOutput(0, "x", (newline[0],), "length", logprobs=({newline[0]: -0.5},))
    assert scores(quoted, llm.tokenizer).splitlines()[1].split() == ['"\\n"', "-0.500"]
    output = RequestOutput("r", "p", (1,), (done,), True, RequestMetrics(0.0))
    told = facts(output, None)["outputs"][0]["logprobs"][1]
    assert told["logprob"] is None and told["likeliest"][0] == {"token_id": 5, "token": None, "logprob": -1.0}


FLAGS: dict[str, Any] = {
    "n": 2, "min_tokens": 3, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.5,
    "frequency_penalty": -0.5, "no_repeat_ngram_size": 3, "logprobs": 4, "temperature": 0.7, "top_k": 9, "top_p": 0.8,
}  # fmt: skip


@pytest.mark.parametrize("verb", ["generate", "run", "chat"])
def test_every_flag_arrives(run: Any, engine: Path, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[SamplingParams, dict[str, Any]]] = []

    def stopped(self: LLM, prompt: Any, params: SamplingParams, **more: Any) -> None:
        seen.append((params, more))
        raise PromptError("stop here")

    monkeypatch.setattr(LLM, "generate", stopped)
    monkeypatch.setattr(LLM, "stream", stopped)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    words = {
        "generate": ["generate", engine, "-p", "x", "--max_tokens", 8],
        "run": ["run", "--engine_dir", engine, "--input_text", "x", "--max_output_len", 8],
        "chat": ["chat", engine, "--max_tokens", 8],
    }[verb]
    given = {
        name: value for name, value in FLAGS.items() if verb != "chat" or name not in ("n", "min_tokens", "logprobs")
    }
    words += [word for name, value in given.items() for word in (f"--{name}", value)]
    if verb != "chat":
        words += ["--bad_words", "God", "--bad_words", "the earth", "--timeout", 9]
    assert run(*words).code == 2
    ((params, more),) = seen
    assert {name: getattr(params, name) for name in given} == given and params.max_tokens == 8
    if verb != "chat":
        assert params.bad_words == ("God", "the earth") and more == {"timeout": 9.0}


def test_the_classic_flags_of_run(run: Any, engine: Path, llm: LLM) -> None:
    args = ("run", "--engine_dir", engine, "--input_text", "In the", "--input_text", "A tuple", "--max_output_len", 4)
    asked: dict[str, Any] = {"use_beam_search": True, "max_tokens": 4}
    want = llm.generate(["In the", "A tuple"], SamplingParams(n=2, **asked))
    lines = [
        line
        for i, output in enumerate(want)
        for line in (
            f'Input [Text {i}]: "{output.prompt}"',
            *(f'Output [Text {i} Beam {b}]: "{e.text}" (score {e.score:.4f})' for b, e in enumerate(output.outputs)),
        )
    ]
    ran = run(*args, "--num_beams", 2)
    assert ran.out == "\n".join(lines) + "\n" and "[16 tokens generated for 2 texts]" in ran.err
    data = run(*args, "--num_beams", 3, "--num_return_sequences", 1, "--json").data
    assert [len(each["outputs"]) for each in data] == [1, 1]
    sampled = run(*args, "--n", 2, "--seed", 3, "--logprobs", 1).out
    assert "Output [Text 1 Seq 1]: " in sampled and sampled.count("likeliest") == 4


def test_a_deadline_ends_a_text_with_what_it_has(run: Any, engine: Path) -> None:
    args = ("generate", engine, "-p", PROMPT, "--max_tokens", 200, "--timeout", "0.000001")
    ran = run(*args)
    assert (ran.code, ran.out) == (0, "\n") and "0 generated (timeout); ended after" in ran.err
    ran = run(*args, "--beams", 2, "--json")
    (only,) = ran.data["outputs"]
    assert (only["text"], only["finish_reason"]) == ("", "timeout") and "0 generated (timeout)" in ran.err
    for n, said in ((2, "[0]\n\n"), (1, "\n")):
        ran = run(*args, "--beams", 2, "--n", n)
        assert (ran.code, ran.out) == (0, said) and "0 generated (timeout)" in ran.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--beams 0", "--beams 0 is outside 1 to 16"),
        ("--beams 17", "--beams 17 is outside 1 to 16"),
        ("--beams 2 --n 3", "beam_width=2 is below n=3"),
        ("--beams 2 --temperature 0.5", "temperature=0.5 has no meaning with use_beam_search"),
        ("--beams 2 --logprobs 1", "logprobs=1 has no meaning"),
        ("--beams 8", "beam_width=8, the limit is max_batch_size=4"),
        ("--length_penalty 2", "--length_penalty 2.0 ranks beams; give --beams N"),
        ("--n 0", "n=0"),
        ("--n 2.5", "'--n'"),
        ("--min_p 2", "min_p=2.0 is outside its range"),
        ("--repetition_penalty 0", "repetition_penalty=0.0"),
        ("--presence_penalty 3", "presence_penalty=3.0"),
        ("--frequency_penalty nan", "frequency_penalty=nan"),
        ("--no_repeat_ngram_size -1", "no_repeat_ngram_size=-1"),
        ("--logprobs 33", "logprobs=33"),
        ("--min_tokens 9 --max_tokens 8", "min_tokens=9 is over max_tokens=8"),
        ("--bad_words=", "bad_words=('',)"),
        ("--timeout 0", "--timeout 0.0 is no number of seconds above 0"),
        ("--timeout nan", "--timeout nan"),
    ],
)
def test_bad_values_are_one_line(run: Any, engine: Path, words: str, said: str) -> None:
    ran = run("generate", engine, "-p", "x", *words.split(" "))
    assert (ran.code, ran.out) == (2, "")
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0], ran.err
    assert "ready" not in ran.err or "--beams 8" in words  # what needs no engine is said before one is opened
