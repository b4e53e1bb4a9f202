"""Worker under TRITON_INTERPRET=1: chunks behind many keys, whose few tiles are cut into parts and joined."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from penstock.engine.device import H200
from penstock.engine.program import Site
from penstock.ir.op import get
from penstock.kernels.attention.ragged import Ragged
from penstock.kernels.attention.shape import Parts, Shape
from penstock.kernels.tactic import KernelUse
from tests.kernels import interpreted
from tests.kernels.cases.attention import FP8, Rows, attention, on_attention, sizes
from tests.kernels.subprocess_cases import differences, expected, poisoned

AT = {**sizes(330, 6, 20), "N": 121}
# Tiles are of 32 queries and 64 keys here, and no part has less than 256 keys.
QUERIES = (5, 32, 33, 100)
BEFORE = (0, 479, 480, 704)


def main(every: bool) -> None:
    interpreted.patch()
    cases = list(_cases(every))
    cut = [_cut(site, rows) for site, rows in cases]
    # A chunk is cut when the keys that it sees fill two parts.
    wanted = [any(n > 4 and (n + before + 63) // 64 >= 8 for n, before in rows) for _, rows in cases]
    assert cut == wanted and 6 < sum(cut) < len(cut), (cut, wanted)
    print("equal")


def _cases(every: bool) -> Iterator[tuple[Site, Rows]]:
    """Every length behind every other, or each behind two."""
    plain = attention("f16", 2, 1, 16)
    for i, n in enumerate(QUERIES):
        for before in BEFORE if every else (BEFORE[i], BEFORE[(i + 1) % len(BEFORE)]):
            yield plain, ((1, 40), (n, before), (0, 0), (1, 700))
    others = (attention("f16", 2, 1, 16, pool=FP8), attention("f16", 3, 1, 16, window=520, softcap=20.0))
    for site in others:
        yield site, ((40, 704), (1, 3), (33, 960), (20, 0), (0, 0), (9, 481))
        yield site, ((200, 600), (1, 30))


def _cut(site: Site, rows: Rows) -> bool:
    """Whether parts were made; the result is right either way, and does not depend on what the memory held."""
    config = Ragged().tunables(site, AT, H200)[0]
    draft = Ragged().plan(site, AT, H200, config)
    parts = Parts.of(Shape.of(site), AT, H200, config, 4)
    example = get("attention").example
    assert example is not None
    tensors = example(site.inputs, dict(site.attrs), AT, torch.Generator().manual_seed(len(rows)), "cpu")
    inputs = on_attention(site, list(tensors), AT, rows)
    got, memory = poisoned(site, AT, inputs), interpreted.memory_of(draft)
    single, long = draft.steps  # neither needs the other, so what is found after the long rows is theirs
    assert isinstance(single, KernelUse) and isinstance(long, KernelUse)
    interpreted.launch(long, {"in": inputs, "out": got}, memory)
    touched = bool((memory["workspace"] != 0xFF).any())
    interpreted.launch(single, {"in": inputs, "out": got}, memory)
    interpreted.check(draft, memory)
    assert not (found := differences(site, inputs, expected(site, AT, inputs), got)), (rows, found)
    assert got[0].isfinite().all()
    assert parts.aim > 1
    return touched


if __name__ == "__main__":
    main("every" in sys.argv[1:])
