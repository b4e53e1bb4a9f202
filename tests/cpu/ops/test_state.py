"""prepare and commit: what the device believes of its slots is what the uploads said."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.ir.ops.state import SlotLayout, commit, prepare, prepared

LAYOUT = SlotLayout(num_slots=4, history=40, table=3)


def _upload(rows: list[tuple[int, int, int]], writes: list[tuple[int, int]]) -> torch.Tensor:
    header = [len(rows), sum(n for _, n, _ in rows), sum(s for *_, s in rows), len(writes)]
    flat = [*header, *(x for r in rows for x in r), *(x for w in writes for x in w)]
    return torch.tensor([*flat, *[-7] * 50], dtype=torch.int32)  # what lies behind is an older, longer upload's


@given(
    st.lists(
        st.tuples(st.permutations(range(4)), st.integers(1, 4), st.lists(st.integers(1, 3), min_size=4, max_size=4)),
        max_size=6,
    )
)
@settings(max_examples=40, deadline=None)
def test_steps_read_the_tokens_that_were_written_and_sampled(steps: list[tuple[list[int], int, list[int]]]) -> None:
    slots = torch.zeros(LAYOUT.size, dtype=torch.int32)
    history: dict[int, list[int]] = {s: [] for s in range(4)}
    pending: dict[int, int] = {}
    for step, (order, count, sizes) in enumerate(steps):
        rows, writes, want = [], [], []
        for slot in order[:count]:
            new = [100 * step + slot * 10 + i for i in range(sizes[slot])]
            if slot in pending:
                new = [pending.pop(slot)]
            else:
                at = LAYOUT.history_at + slot * LAYOUT.history + len(history[slot])
                writes += [(at + i, t) for i, t in enumerate(new)]
            rows.append((slot, len(new), slot % 2))
            want.append((new, len(history[slot])))
            history[slot] += new
        upload = _upload(rows, writes)
        got = dict(zip(prepared(LAYOUT), prepare(slots, upload, **LAYOUT.attrs()), strict=True))
        assert got["tokens"].tolist() == [t for new, _ in want for t in new]
        assert got["positions"].tolist() == [start + i for new, start in want for i in range(len(new))]
        assert got["rows"].tolist() == [r for r, (new, _) in enumerate(want) for _ in new]
        assert got["context_len"].tolist() == [len(history[slot]) for slot, *_ in rows]
        ends = torch.tensor([n for _, n, _ in rows]).cumsum(0) - 1
        assert got["logit_rows"].tolist() == [int(e) for e, (_, _, s) in zip(ends, rows, strict=True) if s]
        sampled = torch.arange(int(upload[2]), dtype=torch.int32) + 7000 + step
        commit(slots, upload, sampled, **LAYOUT.attrs())
        pending |= dict(zip([slot for slot, _, s in rows if s], sampled.tolist(), strict=True))


def test_padding_is_what_kernels_may_rely_on() -> None:
    layout = replace(LAYOUT, tables=2, slot_rows=1, freqs=2)
    slots = torch.zeros(layout.size, dtype=torch.int32)
    upload = _upload([(2, 3, 1)], [(layout.table_of(2), 9), (layout.table_of(2, 1) + 1, 8)])
    results = prepare(slots, upload, **layout.attrs(), sizes={"T": 8, "S": 4, "L": 2})
    got = dict(zip(prepared(layout), results, strict=True))
    assert got["rows"].tolist() == [0, 0, 0, -1, -1, -1, -1, -1]
    assert got["query_len"].tolist() == [3, 0, 0, 0]
    assert got["block_table"].tolist() == [[9, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert got["block_table1"].tolist() == [[0, 8, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert got["slot_of_row"].tolist() == [2, -1, -1, -1] and got["freqs"].shape == (4, 2)
    assert got["tokens"].shape == (8,) and got["temperature"].shape == (2,)
