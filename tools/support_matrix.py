"""docs/support.md, made from the registry: `python -m tools.support_matrix`, or --check.

A cell says of a family, a format and a generation of GPUs what is known: tested; compiled only; in part on the slow
reference; refused. Tested on a CPU is what has a twin in tests/cpu/models/twins.py; on a GPU what has a record in
bench/results/h200/families/records.jsonl. `--log FILE --device NAME --commit ID` adds those of the families step of
tools/gpu, whose log FILE is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from penstock.compiler.build import read_model
from penstock.compiler.options import BuildOptions
from penstock.compiler.select import all_sites
from penstock.engine.device import H200, Device
from penstock.engine.program import Site, Sizes
from penstock.errors import PenstockError
from penstock.kernels.reference import has_parts
from penstock.kernels.registry import tactics
from penstock.models.registry import Family, families_known, family_of
from tests.cpu.models.twins import CASES
from tests.facts.pending import READ, REFUSED
from tests.facts.tensors import published_config
from tests.shrunk import SHRUNK

ROOT = Path(__file__).resolve().parents[1]
PAGE, RECORDS = ROOT / "docs" / "support.md", ROOT / "bench" / "results" / "h200" / "families" / "records.jsonl"
# heading -> (dtype, kv_cache_dtype)
FORMATS = {
    "f32": ("float32", "auto"), "bf16": ("bfloat16", "auto"), "f16": ("float16", "auto"),
    "KV fp8": ("bfloat16", "fp8"),
}  # fmt: skip
GPUS = {
    "sm_80": Device("cuda", "an A100", 80, 108, 40 << 20, 80 << 30),
    "sm_89": Device("cuda", "an L40S", 89, 142, 96 << 20, 48 << 30),
    "sm_90": H200,
    "sm_100": Device("cuda", "a B200", 100, 148, 126 << 20, 180 << 30),
}
DEFAULTS = "defaults of "  # before a family of which the facts have no model
LAYERS = 6  # of a model: enough for every kind of layer that the published ones alternate
TESTED, COMPILED, SLOW, REFUSAL = "tested", "compiled only", "slow", "refused"
LOGGED = re.compile(r"(\S+) (float32|bfloat16|float16) (decoded|scored): (.+)")
HEAD = """# What runs where

Made by `tools/support_matrix.py` from the registry, the tests and their records; not written by hand.

* **tested**: on a CPU a tiny twin of the family says what its source of truth says, in the tests (float32 logits and
  greedy tokens). On a GPU a small model of the family decodes and scores on an H200 as it does on a CPU, on record.
* **compiled only**: every operation of the fused graph has a kernel or a library call that takes its types and sizes on
  that GPU, for a step of one token and for one of many; nothing was run there. On a CPU the references take any format.
* **slow**: the same but for the operations of the note, which run as the reference in PyTorch.
* **refused**: an error says so before any work; the note has it.

KV fp8: bf16 with KV in fp8. The models named stand for their family, with fewer layers. A GPU is its generation's large
one; kernels are tuned on sm_90 alone.
"""


class Cell(NamedTuple):
    state: str
    why: str = ""


# Models that bear a family's name beside mathematics of their own: on a CPU a twin is tested, no record is of them.
APART = ("chatglm-6b",)


def page() -> str:
    """The whole text."""
    notes: list[str] = []
    known = sorted(families_known(), key=lambda family: family.name)
    rows = [[f"`{f.name}`", ", ".join(_stems(f)), *_cells(f, notes)] for f in known]
    rows += [[f"`{_stem_family(stem)}`", stem, *_cells_apart(stem, notes)] for stem in APART]
    named = [[f"`{f.name}`", ", ".join(f"`{name}`" for name in f.architectures), _refused(f)] for f in known]
    parts = [HEAD, _table(["family", "model", "CPU", *GPUS], rows), *_notes(notes)]
    parts += ["## By name\nThe architectures that `config.json` may name, and published models that are refused.\n"]
    parts += [_table(["family", "architectures", "refused"], named), TOKENIZERS]
    return "\n".join(parts)


TOKENIZERS = """## Tokenizers
`tokenizer.json` of any family; where there is none, SentencePiece, tiktoken and `vocab.json` with `merges.txt`:
[checkpoints](checkpoints.md#tokenizers) says whose. A tokenizer class that is not known is refused.
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _notes(notes: Sequence[str]) -> Iterator[str]:
    yield from (f"{i}. {note}" for i, note in enumerate(notes, 1))
    yield ""


def _cells(family: Family, notes: list[str]) -> Iterator[str]:
    yield _said({form: _on_cpu(family, form) for form in FORMATS}, notes)
    for generation in GPUS:
        yield _said({form: _on_gpu(family, form, generation) for form in FORMATS}, notes)


def _cells_apart(stem: str, notes: list[str]) -> Iterator[str]:
    yield _said({form: Cell(TESTED if form == "f32" else COMPILED) for form in FORMATS}, notes)
    for generation in GPUS:
        yield _said({form: _of_model(stem, form, generation) for form in FORMATS}, notes)


def _said(cells: dict[str, Cell], notes: list[str]) -> str:
    """Formats of one state together, in order; a reason is a note."""
    groups: dict[Cell, list[str]] = {}
    for form, cell in cells.items():
        groups.setdefault(cell, []).append(form)
    return "; ".join(f"{cell.state}{_mark(cell.why, notes)}: {', '.join(forms)}" for cell, forms in groups.items())


def _mark(why: str, notes: list[str]) -> str:
    if why and why not in notes:
        notes.append(why)
    return f" ({notes.index(why) + 1})" if why else ""


def _on_cpu(family: Family, form: str) -> Cell:
    twins = {kind for kind, _ in CASES.values()}
    return Cell(TESTED if form == "f32" and family.name in twins else COMPILED)


def _on_gpu(family: Family, form: str, generation: str) -> Cell:
    """The worst of the models that stand for the family."""
    found = [_of_model(stem, form, generation) for stem in _stems(family)]
    worst = max(found, key=lambda cell: [COMPILED, SLOW, REFUSAL].index(cell.state))
    own = {(name, form) for name in SHRUNK if _stem_family(SHRUNK[name][0]) == family.name}
    tested = generation == "sm_90" and own and own <= _recorded()
    return Cell(TESTED, worst.why) if tested else worst


@cache
def _of_model(stem: str, form: str, generation: str) -> Cell:
    device, sites = GPUS[generation], _sites(stem, form)
    try:
        BuildOptions(*_options(form)).kv_format("bf16", device)
    except PenstockError as error:
        return Cell(REFUSAL, str(error))
    if isinstance(sites, str):
        return Cell(REFUSAL, sites)
    slow = sorted({site.op for site, sizes in sites if _on_the_reference(site, sizes, device)})
    return Cell(SLOW, "on the reference: " + ", ".join(slow)) if slow else Cell(COMPILED)


def _on_the_reference(site: Site, sizes: Sizes, device: Device) -> bool:
    """No tactic takes it, and it is not made of parts, which stand among the sites themselves."""
    return not has_parts(site.op) and all(tactic.supports(site, sizes, device) for tactic in tactics(site.op))


@cache
def _sites(stem: str, form: str) -> list[tuple[Site, Sizes]] | str:
    """Every operation of a step of one token and of the most; or why the model is refused."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(_shallow(_config(stem))))
        try:
            draft = read_model(Path(directory), BuildOptions(*_options(form)), H200).draft
        except PenstockError as error:
            return str(error).replace(f"{directory}/", "")
    sites, most = all_sites(draft.graphs.values()).values(), draft.profile.max_num_tokens
    return [(site, sizes) for sizes in (draft.profile.sizes(1, 1), draft.profile.sizes(most, 1)) for site in sites]


def _options(form: str) -> tuple[Any, ...]:
    dtype, kv = FORMATS[form]
    return (dtype, "random", "cuda", None, None, None, 64, {}, None, kv)


def _shallow(config: dict[str, Any]) -> dict[str, Any]:
    """Fewer layers, and none of a foreign quantisation."""
    small = {key: value for key, value in config.items() if key != "quantization_config"}
    for key in ("n_layer", "n_layers", "num_layers", "num_hidden_layers"):
        if key in small:
            small[key] = min(small[key], LAYERS)
    return {**small, **({"layer_types": small["layer_types"][:LAYERS]} if small.get("layer_types") else {})}


@cache
def _stem_family(stem: str) -> str:
    return family_of(published_config(stem)).name


def _stems(family: Family) -> list[str]:
    """Of each kind that the tests tell apart one published model; without any Transformers' defaults."""
    own = [stem for stem, _ in SHRUNK.values() if _stem_family(stem) == family.name]
    return own or [stem for stem in READ if _stem_family(stem) == family.name][:1] or [f"{DEFAULTS}{family.name}"]


def _config(stem: str) -> dict[str, Any]:
    if not stem.startswith(DEFAULTS):
        return dict(published_config(stem))
    from transformers import AutoConfig

    return dict(AutoConfig.for_model(stem.removeprefix(DEFAULTS)).to_dict())


def _refused(family: Family) -> str:
    return ", ".join(f"{s}: `{key}`" for s, key in REFUSED.items() if _stem_family(s) == family.name)


@cache
def _recorded() -> set[tuple[str, str]]:
    lines = RECORDS.read_text("utf-8").splitlines() if RECORDS.is_file() else []
    return {(record["model"], record["format"]) for record in map(json.loads, lines)}


def records(log: str, device: str, commit: str) -> Iterator[dict[str, Any]]:
    """One for each family and format that passed: what pytest -rP prints of passed tests."""
    passed = log.partition("= PASSES =")[2]
    short = {dtype: form for form, (dtype, kv) in FORMATS.items() if kv == "auto"}
    found: dict[tuple[str, str], list[str]] = {}
    for name, dtype, way, said in LOGGED.findall(passed):
        found.setdefault((name, short[dtype]), []).append(f"{way} {said}")
    for (name, form), notes in found.items():
        yield {
            "metric": "agrees_with_cpu", "value": 1, "unit": "of 1", "model": name, "format": form,
            "note": "tests/gpu/test_families.py: " + "; ".join(notes), "commit": commit,
            "when": datetime.now(UTC).isoformat(timespec="seconds"), "environment": {"device": device},
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="say whether the page is in step; write nothing")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    if arguments.log:
        if not (arguments.device and arguments.commit):
            parser.error("--log needs --device and --commit, which stand in the records")
        new = records(arguments.log.read_text("utf-8"), arguments.device, arguments.commit)
        with RECORDS.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in new)
    text = page()
    if arguments.check:
        return int(not PAGE.is_file() or PAGE.read_text("utf-8") != text)
    PAGE.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
