"""Builds the training corpus out of four Debian packages: one xz file per voice and the held-out text.

apt-get download bible-kjv bible-kjv-text wordnet-base python3.11-doc dict-jargon
for deb in *.deb; do dpkg -x "$deb" packages; done
python3 tools/train/corpus.py --packages packages --out .corpus
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import sources
from sources import Passage

HELD_OUT_BYTES = {"scripture": 80_000, "dictionary": 40_000, "manual": 65_000, "jargon": 15_000}
DEV_BYTES = {"scripture": 40_000, "dictionary": 40_000, "manual": 40_000, "jargon": 10_000}
"""Dev passages choose checkpoints; the held-out text is only ever measured on."""


def split(passages: list[Passage], held_out: int, dev: int, seed: int) -> dict[str, list[Passage]]:
    """Whole passages at random until each quota of bytes is met; everything else trains."""
    order = passages[:]
    random.Random(seed).shuffle(order)
    parts: dict[str, list[Passage]] = {"heldout": [], "dev": [], "train": []}
    room = {"heldout": held_out, "dev": dev}
    for passage in order:
        size = len(passage.text.encode())
        # A very long passage would spend a whole quota on one topic.
        part = next((name for name, left in room.items() if left > 0 and size < 12_000), "train")
        if part != "train":
            room[part] -= size
        parts[part].append(passage)
    return parts


def write_jsonl(path: Path, passages: Iterable[Passage], with_facts: bool) -> None:
    lines = [json.dumps(asdict(p) if with_facts else _bare(p)) + "\n" for p in passages]
    data = "".join(lines).encode()
    path.write_bytes(lzma.compress(data, preset=9) if path.suffix == ".xz" else data)


def _bare(passage: Passage) -> dict[str, str]:
    return {"voice": passage.voice, "title": passage.title, "text": passage.text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder into which the packages were unpacked")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1611)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    held_out: list[Passage] = []
    for voice, reader in sources.READERS.items():
        passages = [_few_facts(p, args.seed) for p in reader(args.packages)]
        parts = split(passages, HELD_OUT_BYTES[voice], DEV_BYTES[voice], args.seed)
        held_out += parts["heldout"]
        write_jsonl(args.out / f"{voice}.train.jsonl.xz", parts["train"], with_facts=True)
        write_jsonl(args.out / f"{voice}.dev.jsonl.xz", parts["dev"], with_facts=False)
        print(voice, {name: (len(part), sum(len(p.text) for p in part)) for name, part in parts.items()})
    write_jsonl(args.out / "heldout.jsonl", held_out, with_facts=False)


def _few_facts(passage: Passage, seed: int, most: int = 4) -> Passage:
    chosen = random.Random(f"{seed} {passage.title}").sample(passage.facts, min(most, len(passage.facts)))
    return Passage(passage.voice, passage.title, passage.text, tuple(chosen))


if __name__ == "__main__":
    main()
