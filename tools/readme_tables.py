"""Tables of the README and the docs, made from the results that are kept: `python tools/readme_tables.py`, or --check.

Between `<!-- results:NAME -->` and `<!-- end of results -->` stands a table of bench/results/NAME/*.jsonl: the latest
record of each model, format and figure. A figure is never typed by hand. NAME may say more:
* `results:NAME metric ...`: those figures alone; what is not there is said to be not measured yet.
* `results:NAME/peers`: the figures that people compare, beside those of NAME/peers.jsonl, which are others' engines.
* `results:NAME/checks`: NAME/checks.jsonl alone, which holds what is right rather than fast.
* `results:NAME/scaling`: NAME/scaling.jsonl alone, by batch and context.
* `results:NAME/throughput`: NAME/throughput.jsonl alone, a row for each workload and below it what compares them.
* `results:NAME/serving`: NAME/serving.jsonl alone, the same of load over HTTP beside the executor's own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECTION = re.compile(r"(<!-- results:([\w./-]+)((?: [\w.-]+)*) -->\n).*?(<!-- end of results -->)", re.DOTALL)
# Names of files that have tables of their own.
CHECKS, PEERS, SCALING, THROUGHPUT, SERVING = "checks", "peers", "scaling", "throughput", "serving"
APART = (CHECKS, PEERS, SCALING, THROUGHPUT, SERVING)
SIDE = "."  # between a workload and what was measured beside its rate
BESIDE = (
    ("all (tok/s)", "total"), ("TTFT mean (ms)", "ttft_mean_ms"), ("P99", "ttft_p99_ms"),
    ("inter-token P50 (ms)", "itl_p50_ms"), ("P99", "itl_p99_ms"), ("GPU busy (%)", "busy"),
    ("host (us a step)", "host_us_per_step"), ("rows a step", "rows_per_step"), ("KV waste (%)", "kv_waste"),
)  # fmt: skip
SERVED = (
    ("all (tok/s)", "total"), ("TTFT mean (ms)", "ttft_mean_ms"), ("P99", "ttft_p99_ms"),
    ("inter-token P50 (ms)", "itl_median_ms"), ("P99", "itl_p99_ms"), ("failed", "failed"),
    ("client lag P99 (ms)", "client_lag_p99_ms"), ("client CPU (%)", "client_cpu"),
)  # fmt: skip
NOTHING = "No results are kept yet: `bench/results/{name}/` is empty.\n"
MISSING = "not measured yet"
LESS_IS_BETTER = ("ms", "s", "us", "GiB", "GB")
COMPARED = (
    "decode_bs1", "decode_bs8", "decode_bs64", "ttft_mean_ms", "ttft_p99_ms", "prefill_2048x64",
    "prefill_2048x64_sustained", "throughput_mixed", "throughput_static", "host_us_per_step_bs64", "start_first_s",
    "start_cached_s", "load_s", "memory_gib",
)  # fmt: skip
PROMPT_INSIDE = "with the prompt's time in it"  # in the note of a decode rate
MARK = r" \*"
MARKED = rf"{MARK.strip()} {PROMPT_INSIDE}, which ours leaves out."
Record = Mapping[str, Any]


def filled(text: str, results: Path) -> str:
    """A page's text with every section made anew."""
    return SECTION.sub(lambda m: m[1] + section(m[2], results / m[2], m[3].split()) + m[4], text)


def section(name: str, folder: Path, metrics: Sequence[str] = ()) -> str:
    """The table of one machine's results, of some of them, beside its peers, or of its checks."""
    if folder.name == PEERS:
        ours, others = latest(read(folder.parent)), latest(read(folder))
        if not others:
            return NOTHING.format(name=name)
        marked = [MARKED] if any(map(_mark, others)) else []
        return _page(beside(ours, others), [*ours, *others], marked)
    checks = folder.name == CHECKS
    records = latest(read(folder))
    if folder.name in (THROUGHPUT, SERVING) and records:
        columns = BESIDE if folder.name == THROUGHPUT else SERVED
        return _page(workloads(records, columns), []) + _page(_rows(compared(records), False), records)
    if metrics:
        chosen = [r for r in records if r["metric"] in metrics]
        return _page(_rows(chosen, False, [m for m in metrics if m not in {r["metric"] for r in chosen}]), chosen)
    return _page(_rows(records, checks), records) if records else NOTHING.format(name=name)


def read(folder: Path) -> list[Record]:
    """The records of a folder's files, or of one of those that stand apart; by time."""
    own = folder.name in APART
    files = [folder.with_suffix(".jsonl")] if own else sorted(folder.glob("*.jsonl"))
    kept = (file for file in files if file.is_file() and (own or file.stem not in APART))
    records = [json.loads(line) for file in kept for line in file.read_text("utf-8").splitlines()]
    return sorted(records, key=lambda record: str(record.get("when", "")))


def latest(records: Sequence[Record]) -> list[Record]:
    """Of each model, format, engine and figure the last written, in the order in which they first appear."""
    found: dict[tuple[str, ...], Record] = {}
    for record in records:
        found[record["model"], record["format"], record.get("engine", ""), record["metric"]] = record
    return list(found.values())


def beside(ours: Sequence[Record], others: Sequence[Record]) -> Iterator[list[str]]:
    """Rows of COMPARED for each model and format that a peer has: theirs, the roof, ours, and its share of the roof."""
    engines = list(dict.fromkeys(str(r["engine"]) for r in others))
    yield ["model", "format", "figure", *engines, "the roof", "Penstock", "of the roof", "commit"]
    for model, format in dict.fromkeys((r["model"], r["format"]) for r in others):
        own = {r["metric"]: r for r in ours if (r["model"], r["format"], r.get("engine", "")) == (model, format, "")}
        theirs = {(r["engine"], r["metric"]): r for r in others if (r["model"], r["format"]) == (model, format)}
        for metric in COMPARED:
            row = [theirs.get((engine, metric)) for engine in engines]
            if metric in own or any(row):
                cells = ["" if r is None else f"{_number(r['value'])} {r['unit']}{_mark(r)}" for r in row]
                yield [model, format, metric, *cells, *_own(own.get(metric))]


def workloads(records: Sequence[Record], columns: Sequence[tuple[str, str]]) -> Iterator[list[str]]:
    """A row for each rate that has figures beside it."""
    yield ["model", "format", "workload", "out (tok/s)", "of the roof", *(head for head, _ in columns), "commit"]
    by_name = {(r["model"], r["format"], r["metric"]): r for r in records}
    for (model, format, name), record in by_name.items():
        side = [by_name.get((model, format, f"{name}{SIDE}{metric}")) for _, metric in columns]
        if any(side):
            cells = ["" if each is None else _number(each["value"]) for each in side]
            own = [_number(record["value"]), _share(record)]
            yield [model, format, name, *own, *cells, record.get("commit", "")]


def compared(records: Sequence[Record]) -> list[Record]:
    """What stands in no row of a workload: ratios, and the roof."""
    rates = {r["metric"].partition(SIDE)[0] for r in records if SIDE in r["metric"]}
    return [r for r in records if SIDE not in r["metric"] and r["metric"] not in rates]


def roof(record: Record) -> float | None:
    """The figure at best, by the share of it that was reached."""
    share = record.get("share_of_roof")
    if not share:
        return None
    return float(record["value"] * share if record["unit"] in LESS_IS_BETTER else record["value"] / share)


def _mark(record: Record) -> str:
    """A star at a decode rate that was measured in another way than ours; the note of the record says so."""
    return MARK if record["metric"].startswith("decode") and PROMPT_INSIDE in record.get("note", "") else ""


def _own(record: Record | None) -> list[str]:
    if record is None:
        return ["", MISSING, "", ""]
    least = roof(record)
    return ["" if least is None else _number(least), _value(record), _share(record), record.get("commit", "")]


def _rows(records: Sequence[Record], checks: bool, missing: Sequence[str] = ()) -> Iterator[list[str]]:
    names = ["model", "format", "check", "result"] if checks else ["model", "format", "figure", "value", "of the roof"]
    yield [*names, "commit"]
    for record in records:
        share = [] if checks else [_share(record)]
        yield [record["model"], record["format"], record["metric"], _value(record), *share, record.get("commit", "")]
    for metric in missing:
        yield ["", "", metric, MISSING, *([] if checks else [""]), ""]


def _value(record: Record) -> str:
    spread = record.get("spread")
    return _number(record["value"]) + (f" ± {_number(spread)}" if spread else "") + f" {record['unit']}"


def _share(record: Record) -> str:
    share = record.get("share_of_roof")
    return "" if share is None else f"{share:.1%}"


def _page(rows: Iterator[list[str]], records: Sequence[Record], notes: Sequence[str] = ()) -> str:
    head, *rest = rows
    lines = [_line(head), "|---" * len(head) + "|", *map(_line, rest)]
    below = [text for note in notes for text in (note, "")]
    return "\n".join(["", *lines, "", *below, *_environments(records), ""]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    """Three digits or all before the point, with thousands set apart."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _environments(records: Sequence[Record]) -> list[str]:
    texts = (", ".join(_facts(r.get("environment", {}))) for r in records)
    return [f"Measured with {text}." for text in dict.fromkeys(texts) if text]


def _facts(environment: Mapping[str, Any], of: str = "") -> Iterator[str]:
    """Each with its name; those of a part, such as a client, with the part's in front."""
    for name, value in sorted(environment.items()):
        if isinstance(value, Mapping):
            yield from _facts(value, f"{name}'s ")
        else:
            yield f"{of}{name} {value}"


def pages() -> list[Path]:
    """The README and every page of the docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is out of step")
    check, stale = parser.parse_args(words).check, 0
    for page in pages():
        old = page.read_text("utf-8")
        new = filled(old, ROOT / "bench" / "results")
        if check:
            stale += new != old
            print(
                f"{page.name} is in step" if new == old else f"{page.name} is out of step; run tools/readme_tables.py"
            )
        elif new != old:
            page.write_text(new, "utf-8")
    return int(stale > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
