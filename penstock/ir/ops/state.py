"""State: the KV cache, and the slots in which the device keeps every running request.

The slot arena is one flat i32 tensor, so that a step uploads its changes as (index, value) pairs in a single copy;
`SlotLayout` says where each field lies. Floats travel as their bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from penstock.ir.graph import Type, tensor
from penstock.ir.lazy import torch
from penstock.ir.op import op
from penstock.ir.ops.examples import context_of, fill, integers, ragged, table

HEADER = 4  # upload[0:4]: rows, tokens, logit rows, writes
ROW = 3  # then S rows of: slot, tokens in this step, how many of the last ones give logits
FIELDS = ("length", "temperature", "top_k", "top_p", "min_p", "seed")
REALS = frozenset({"temperature", "top_p", "min_p"})  # of FIELDS, those that are floats
CONTROLS = 1024  # numbers of a slot that only rows with penalties, biases, bans or log-probabilities look at


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Where each field of each slot lies in the arena: field after field, slots consecutive within a field."""

    num_slots: int
    history: int  # token ids kept for each slot: the longest sequence, and one for the token just sampled
    table: int  # M: entries of a block-table row
    freqs: int = 0  # rope frequencies kept by request; 0 where the model's are fixed
    controls: int = CONTROLS  # as `ir.ops.control` numbers them
    tables: int = 1  # block tables of a slot: one for each group of layers that keeps blocks
    slot_rows: int = 0  # 1: rows are told their slot, for what is kept by slot
    encoder: int = 0  # 1: a slot keeps how long its input is, which an encoder has read; or its prompt's prefix

    def field(self, name: str) -> int:
        """Index of slot 0's value of a one-number field."""
        return FIELDS.index(name) * self.num_slots

    @property
    def freqs_at(self) -> int:
        return len(FIELDS) * self.num_slots

    @property
    def encoder_at(self) -> int:
        return self.freqs_at + self.num_slots * self.freqs

    @property
    def table_at(self) -> int:
        return self.encoder_at + self.num_slots * self.encoder

    def table_of(self, slot: int, group: int = 0) -> int:
        """Where a slot's block table of one group begins."""
        return self.table_at + (group * self.num_slots + slot) * self.table

    @property
    def controls_at(self) -> int:
        return self.table_at + self.tables * self.num_slots * self.table

    @property
    def history_at(self) -> int:
        return self.controls_at + self.num_slots * self.controls

    @property
    def size(self) -> int:
        """Numbers in the arena."""
        return self.history_at + self.num_slots * self.history

    def attrs(self) -> dict[str, int]:
        return asdict(self)


def _append(kv: Type, k: Type, v: Type, positions: Type, rows: Type, block_table: Type) -> Type:
    width = int(kv.shape[2]) * int(kv.shape[4])
    if k.shape[-1] != width or v.shape[-1] != width:
        raise ValueError(f"keys and values of {k.shape[-1]} and {v.shape[-1]} do not fit a cache of {kv}")
    return kv


def append_example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    """Keys and values of a plausible ragged step."""
    block = int(types[0].shape[3])
    rows, positions, *_ = ragged(sizes, context_of(sizes, block), device)
    tensors = [fill(t, sizes, generator, device) for t in types[:3]]
    return [*tensors, positions, rows, table(sizes, generator, device)]


@op(_append, writes={0: 0}, example=append_example)
def kv_append(kv: Any, k: Any, v: Any, positions: Any, rows: Any, block_table: Any) -> Any:
    """Write each token's key and value at its position of its sequence; tokens of row -1 are padding.

    kv: [N,2,K,B,D], replaced in place; k, v: [T,K*D]; positions, rows: i32[T]; block_table: i32[S,M].
    The cache may be of a narrower format: what is beyond its range becomes its largest number.
    """
    live = (rows >= 0).nonzero()[:, 0]
    at, block = positions[live].long(), kv.shape[3]
    blocks = block_table[rows[live].long(), at // block].long()
    for part, x in enumerate((k, v)):
        kv[blocks, part, :, at % block] = narrowed(x[live], kv.dtype).unflatten(-1, (kv.shape[2], -1))
    return kv


def narrowed(x: Any, dtype: Any) -> Any:
    """Rounded to nearest. Clamped first: some versions of torch make NaN of what is out of range."""
    most = torch.finfo(dtype).max
    return (x.clamp(-most, most) if dtype.itemsize == 1 else x).to(dtype)


def _prepare(slots: Type, upload: Type, **attrs: int) -> tuple[Type, ...]:
    layout = SlotLayout(**attrs)
    by_token = (tensor("i32", "T"),) * 3
    by_row = (tensor("i32", "S"),) * 3
    by_logit = [tensor("f32" if name in REALS else "i32", "L") for name in BY_LOGIT]
    freqs = (tensor("f32", "S", layout.freqs),) if layout.freqs else ()
    table = tensor("i32", "S", layout.table)
    others = (*(table,) * (layout.tables - 1), *(tensor("i32", "S"),) * (layout.slot_rows + layout.encoder))
    return (slots, *by_token, *by_row, table, *by_logit, *freqs, *others)


BY_LOGIT = ("logit_rows", *FIELDS[1:], "sample_position", "logit_slots")
ALWAYS = (
    "slots", "tokens", "positions", "rows", "query_start", "query_len", "context_len", "block_table", *BY_LOGIT
)  # fmt: skip


def table_name(group: int) -> str:
    """The name of a group's block table, of those groups that have one."""
    return f"block_table{group}" if group else "block_table"


def prepared(layout: SlotLayout) -> tuple[str, ...]:
    """The names of what `prepare` returns."""
    by_row = (*("slot_of_row",) * layout.slot_rows, *("encoder_len",) * layout.encoder)
    return (*ALWAYS, *(("freqs",) if layout.freqs else ()), *map(table_name, range(1, layout.tables)), *by_row)


def prepare_example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    """An upload of S rows that share T tokens, with a write."""
    most = int(attrs["history"]) - 1
    base, extra = divmod(sizes["T"], sizes["S"])
    counts = [min(base + (i < extra), most) for i in range(sizes["S"])]
    return _upload_example(SlotLayout(**attrs), counts, sizes, generator, device)


def _upload_example(
    layout: SlotLayout, counts: Sequence[int], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    """Slots at length 0 with random histories, and an upload of rows of so many tokens, of which the first sample."""
    slots = torch.zeros(layout.size, dtype=torch.int32, device=device)
    slots[layout.history_at :] = integers(0, 100, (slots.numel() - layout.history_at,), generator, device)
    slots[layout.encoder_at : layout.table_at] = integers(
        1, 100, (layout.num_slots * layout.encoder,), generator, device
    )
    upload = torch.zeros(sizes["U"], dtype=torch.int32, device=device)
    sampling = min(sizes["L"], len(counts))
    header = [len(counts), sum(counts), sampling, 1]
    body = [x for i, c in enumerate(counts) for x in (i, c, int(i < sampling))]
    numbers = [*header, *body, layout.field("top_k"), 5]
    upload[: len(numbers)] = torch.tensor(numbers, dtype=torch.int32, device=device)
    return [slots, upload]


@op(_prepare, writes={0: 0}, sized=True, example=prepare_example)
def prepare(slots: Any, upload: Any, *, sizes: Any = None, **attrs: int) -> Any:
    """Apply the step's writes to the slots, then expand its rows into everything the forward pass reads.

    slots: i32[A]; upload: i32[U] = HEADER numbers, then ROW numbers for each of the step's rows, then (index, value)
    pairs. Returns the values that `prepared` names. `sizes`, handed in by whoever runs the step, are the bucket's T, S
    and L; left out, the exact sizes of the step are used. Padding tokens have row -1; padding rows no tokens, block 0;
    padding rows of logits, and of `slot_of_row`, slot -1. A row's rows of logits are its last tokens, in order;
    sample_position is the number of tokens up to each.
    """
    layout = SlotLayout(**attrs)
    num_rows, num_tokens, num_logits, num_writes = upload[:HEADER].tolist()
    sizes = sizes or {"T": num_tokens, "S": num_rows, "L": num_logits}
    _write(slots, upload[HEADER + ROW * num_rows :][: 2 * num_writes])
    slot, count, asked = upload[HEADER:][: ROW * num_rows].view(-1, ROW).long().unbind(1)
    length = slots[layout.field("length") + slot]
    start = count.cumsum(0) - count
    rows = torch.repeat_interleave(torch.arange(num_rows, device=slots.device), count)
    positions = length[rows] + torch.arange(num_tokens, device=slots.device) - start[rows]
    tokens = slots[layout.history_at + slot[rows] * layout.history + positions]
    tables = slots[layout.table_at : layout.controls_at].view(layout.tables, layout.num_slots, layout.table)
    blocks, *others = (_padded(table[slot], sizes["S"]) for table in tables)
    chosen = torch.repeat_interleave(torch.arange(num_rows, device=slots.device), asked)
    left = asked.cumsum(0)[chosen] - 1 - torch.arange(chosen.numel(), device=slots.device)  # rows of logits behind it
    fields = [slots[layout.field(name) + slot[chosen]] for name in FIELDS[1:]]
    out: tuple[Any, ...] = (
        _padded(tokens, sizes["T"]), _padded(positions, sizes["T"]), _padded(rows, sizes["T"], -1),
        _padded(start, sizes["S"]), _padded(count, sizes["S"]), _padded(length + count, sizes["S"]),
        blocks, _padded((start + count - 1)[chosen] - left, sizes["L"]),
        *(_padded(x, sizes["L"]).view(_kind(name)) for name, x in zip(FIELDS[1:], fields, strict=True)),
        _padded((length + count)[chosen] - left, sizes["L"]), _padded(slot[chosen], sizes["L"], -1),
    )  # fmt: skip
    if layout.freqs:
        own = slots[layout.freqs_at : layout.encoder_at].view(layout.num_slots, layout.freqs)[slot]
        out = (*out, _padded(own, sizes["S"]).view(torch.float32))
    by_slot = (_padded(slot, sizes["S"], -1),) if layout.slot_rows else ()
    encoder = (_padded(slots[layout.encoder_at + slot], sizes["S"]),) if layout.encoder else ()
    return (slots, *out, *others, *by_slot, *encoder)


def _write(slots: Any, pairs: Any) -> None:
    slots[pairs[0::2].long()] = pairs[1::2]


def _padded(x: Any, size: int, value: int = 0) -> Any:
    out = torch.full((size, *x.shape[1:]), value, dtype=torch.int32, device=x.device)
    out[: x.shape[0]] = x
    return out


def _kind(field: str) -> Any:
    return torch.float32 if field in REALS else torch.int32


def commit_example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    """At most one token a row: a commit lengthens its slots, and may be timed several times on one state."""
    counts = [int(i < sizes["T"]) for i in range(sizes["S"])]
    slots, upload = _upload_example(SlotLayout(**attrs), counts, sizes, generator, device)
    return [slots, upload, integers(0, 100, (sizes["L"],), generator, device)]


@op(lambda slots, upload, sampled, **_: slots, writes={0: 0}, example=commit_example)
def commit(slots: Any, upload: Any, sampled: Any, **attrs: int) -> Any:
    """Lengthen each of the step's slots by its tokens, and store behind them the token sampled from its last logits.

    slots: i32[A], replaced in place; upload: as `prepare` read it; sampled: i32[L], one for each row of logits.
    """
    layout = SlotLayout(**attrs)
    num_rows = int(upload[0])
    slot, count, asked = upload[HEADER:][: ROW * num_rows].view(-1, ROW).long().unbind(1)
    length = slots[layout.field("length") + slot] + count
    slots[layout.field("length") + slot] = length.to(torch.int32)
    chosen = asked.nonzero()[:, 0]
    slots[layout.history_at + slot[chosen] * layout.history + length[chosen]] = sampled[asked.cumsum(0)[chosen] - 1]
    return slots
