"""Flags that several verbs share, by their classic spelling; the parser takes dashes for underscores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from penstock import plugins
from penstock.errors import OptionError

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]", help="Hugging Face, Penstock or engine directory, or a hub name; else the bundled model."
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option("--checkpoint_dir", metavar="DIR", help="The checkpoint, or a hub name; else the bundled model."),
]
Engine = Annotated[Path, typer.Argument(metavar="ENGINE", help="An engine directory.")]
Dtype = Annotated[str, typer.Option("--dtype", metavar="TYPE", help="auto, bfloat16, float16 or float32.")]
KvDtype = Annotated[
    str, typer.Option("--kv_cache_dtype", metavar="TYPE", help="What KV is kept in: auto (the model's type), or fp8.")
]
Task = Annotated[
    str,
    typer.Option(
        "--task", metavar="TASK", help="generate, embed (vectors of texts), or auto: as the model's files say."
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="KIND", help="auto, cuda or cpu.")]
Weights = Annotated[
    str, typer.Option("--weights", metavar="WHENCE", help="checkpoint, or random for a config's shapes alone.")
]
BatchSize = Annotated[int | None, typer.Option("--max_batch_size", metavar="N", help="Most requests in a step.")]
NumTokens = Annotated[int | None, typer.Option("--max_num_tokens", metavar="N", help="Most tokens in a step.")]
SeqLen = Annotated[
    int | None, typer.Option("--max_seq_len", metavar="N", help="Most tokens of a request, prompt included.")
]
Utilization = Annotated[
    float, typer.Option("--gpu_memory_utilization", metavar="SHARE", help="Share of a GPU's memory to use.")
]
GpuBytes = Annotated[
    int | None, typer.Option("--max_gpu_bytes", metavar="N", help="Most bytes of a GPU's memory to use instead.")
]
CacheDir = Annotated[Path | None, typer.Option("--cache_dir", metavar="DIR", help="Where builds and timings are kept.")]
Tactics = Annotated[
    list[str] | None, typer.Option("--tactic", metavar="OP=NAME", help="Pin the tactic of an op; may be repeated.")
]


def _load(modules: list[str] | None) -> list[str] | None:
    """While flags are parsed, so before the command looks anything up."""
    plugins.load(modules or ())
    return modules


Plugin = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin", metavar="MODULE", callback=_load, help="Import a module that registers its own parts first."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
MaxTokens = Annotated[int | None, typer.Option("--max_tokens", metavar="N", help="Most tokens to generate.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", metavar="X", help="0 is greedy; else the model's, or 1.")
]
TopK = Annotated[int | None, typer.Option("--top_k", metavar="N", help="Sample from the N likeliest; 0 is off.")]
TopP = Annotated[float | None, typer.Option("--top_p", metavar="P", help="Sample from the likeliest that sum to P.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="The same seed gives the same text.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated.")
]
Texts = Annotated[
    int | None,
    typer.Option("--n", "--num_return_sequences", metavar="N", help="Texts of each prompt: 1, or all beams."),
]
Beams = Annotated[
    int | None,
    typer.Option("--beams", "--num_beams", metavar="N", help="Search for the likeliest texts with N beams; 1 is off."),
]
LengthPenalty = Annotated[
    float | None, typer.Option("--length_penalty", metavar="X", help="Beams rank by log-probability / length ** X.")
]
MinTokens = Annotated[
    int | None, typer.Option("--min_tokens", metavar="N", help="Fewest tokens before the text may end.")
]
MinP = Annotated[
    float | None, typer.Option("--min_p", metavar="P", help="Sample from those at least P times as likely as the best.")
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option("--repetition_penalty", metavar="X", help="Above 1: what prompt or text hold gets less likely."),
]
PresencePenalty = Annotated[
    float | None, typer.Option("--presence_penalty", metavar="X", help="Taken from the logit of what the text holds.")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option("--frequency_penalty", metavar="X", help="The same, for each time that it is there.")
]
NoRepeat = Annotated[
    int | None, typer.Option("--no_repeat_ngram_size", metavar="N", help="No N tokens come twice; 0 is off.")
]
BadWords = Annotated[
    list[str] | None, typer.Option("--bad_words", metavar="TEXT", help="What may not be written; may be repeated.")
]
Logprobs = Annotated[
    int | None,
    typer.Option("--logprobs", metavar="N", help="Show each token's log-probability beside the N likeliest ones'."),
]
GuidedJson = Annotated[
    str | None, typer.Option("--guided_json", metavar="FILE|TEXT", help="Hold the text to this JSON schema.")
]
GuidedRegex = Annotated[
    str | None, typer.Option("--guided_regex", metavar="EXPR", help="Hold the text to this regular expression.")
]
GuidedChoice = Annotated[
    list[str] | None, typer.Option("--guided_choice", metavar="TEXT", help="Only these texts; to be repeated.")
]
Timeout = Annotated[float | None, typer.Option("--timeout", metavar="SECONDS", help="End by then with what there is.")]


def pins_of(tactics: Sequence[str] | None) -> dict[str, str]:
    """OP=NAME, repeated. Raises OptionError for another form, or for two of one op."""
    pins: dict[str, str] = {}
    for text in tactics or ():
        op, mark, name = text.partition("=")
        if not (op and mark and name):
            raise OptionError(f"--tactic {text!r} is not of the form OP=NAME, like linear=tiled")
        if pins.setdefault(op, name) != name:
            raise OptionError(f"--tactic {text!r} contradicts {op}={pins[op]}; name one tactic for each op")
    return pins


def given(**arguments: Any) -> Mapping[str, Any]:
    """Those that were given."""
    return {name: value for name, value in arguments.items() if value is not None}
