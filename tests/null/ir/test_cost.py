"""What ops cost at least, by hand: bytes once, operations of products, rows of tables and pools that are touched."""

from __future__ import annotations

import subprocess
import sys

import pytest

from penstock.ir.cost import Cost, cost, seconds, seen
from penstock.ir.graph import Attr, Type, tensor
from penstock.ir.op import vocabulary

SIZES = {"T": 8, "S": 2, "L": 2, "M": 64, "U": 5000}
KV = tensor("bf16", "N", 2, 4, 16, 32)  # 4 heads of 32, blocks of 16: 512 bytes a token
X, Q = tensor("bf16", "T", 64), tensor("bf16", "T", 256)
AT, S = tensor("i32", "T"), tensor("i32", "S")
TABLE = tensor("i32", "S", "M")
HEADS: tuple[tuple[str, Attr], ...] = (("heads", 8), ("scale", 1.0))


def of(op: str, inputs: list[Type], outputs: list[Type], attrs: tuple[tuple[str, Attr], ...] = (), **more: int) -> Cost:
    return cost(op, inputs, outputs, attrs, SIZES, **more)


def test_a_product_reads_both_operands_and_multiplies_every_pair() -> None:
    w, y = tensor("bf16", 96, 64), tensor("f32", "T", 96)
    assert of("linear", [X, w], [y]) == Cost(8 * 64 * 2 + 96 * 64 * 2 + 8 * 96 * 4, 2 * 8 * 96 * 64)


def test_tables_cost_the_rows_that_are_looked_up() -> None:
    assert of("embedding", [AT, tensor("bf16", 9999, 64)], [X]).bytes == 8 * 4 + 2 * 8 * 64 * 2
    assert of("take_rows", [X, tensor("i32", "L")], [tensor("bf16", "L", 64)]).bytes == 2 * 4 + 2 * 2 * 64 * 2


def test_a_pool_costs_what_is_appended() -> None:
    k = tensor("bf16", "T", 128)
    assert of("kv_append", [KV, k, k, AT, AT, TABLE], [KV]).bytes == 4 * 8 * 128 * 2 + 2 * 8 * 4 + 2 * 64 * 4


def test_a_mixture_reads_the_experts_that_tokens_go_to() -> None:
    w_in, w_out = tensor("bf16", 4, 2 * 32, 64), tensor("bf16", 4, 64, 32)
    operands = [X, tensor("i32", "T", 1), tensor("f32", "T", 1), w_in, w_out]
    active = 4 * (1 - 0.75**8)  # of four experts, one for each of eight tokens
    found = of("moe", operands, [X], (("act", "silu"),))
    assert found.bytes == pytest.approx(2 * 8 * 64 * 2 + 2 * 8 * 4 + active * 3 * 32 * 64 * 2)
    assert found.flops == 8 * 3 * 2 * 32 * 64


@pytest.mark.parametrize(("window", "keys", "pairs"), [(0, 104, 4 * 100 + 10), (16, 19, 4 * 16)])
def test_attention_reads_each_key_once_and_multiplies_it_by_those_that_see_it(
    window: int, keys: int, pairs: int
) -> None:
    spans = [S, S, S, TABLE]
    attrs = (*HEADS, ("window", window)) if window else HEADS
    found = of("attention", [Q, KV, *spans], [Q], attrs, context=100)
    assert found.bytes == 2 * 8 * 256 * 2 + 3 * 2 * 4 + 2 * 64 * 4 + 2 * keys * 512
    assert found.flops == 2 * pairs * 4 * 256


def test_keys_seen_are_those_that_a_loop_counts() -> None:
    for queries, context, window in ((1, 0, 0), (5, 7, 0), (5, 7, 3), (5, 0, 3), (9, 2, 6), (4, 9, 64)):
        each = (context + i + 1 for i in range(queries))
        assert seen(queries, context, window) == sum(min(n, window) if window else n for n in each)


def test_a_fused_op_costs_its_own_operands_and_its_parts_products() -> None:
    w, y = tensor("bf16", 96, 64), tensor("bf16", "T", 48)
    fused = of("linear_glu", [X, w], [y], (("act", "silu"),))
    assert fused == Cost(8 * 64 * 2 + 96 * 64 * 2 + 8 * 48 * 2, 2 * 8 * 96 * 64)
    qkv, freqs = tensor("bf16", "T", 512), tensor("f32", 1, 16)
    both = of("rope_append", [qkv, KV, AT, freqs, AT, TABLE], [Q, KV], HEADS)
    assert both.bytes == 8 * 512 * 2 + 2 * 8 * 4 + 16 * 4 + 2 * 64 * 4 + 8 * 256 * 2 + 2 * 8 * 128 * 2


def test_an_op_that_nothing_is_known_of_costs_its_operands() -> None:
    assert of("add", [X, X], [X]) == Cost(3 * 8 * 64 * 2, 0.0)


def test_the_slots_cost_the_rows_of_a_step_and_not_the_arena() -> None:
    slots, upload = tensor("i32", 1 << 24), tensor("i32", "U")
    attrs = (("history", 100), ("num_slots", 2), ("table", 64))
    assert of("commit", [slots, upload, tensor("i32", "L")], [slots], attrs).bytes < 200


def test_the_longer_of_bytes_and_operations_counts() -> None:
    assert seconds(Cost(100.0, 10.0), 50.0, 10.0) == 2.0 and seconds(Cost(10.0, 100.0), 50.0, 10.0) == 10.0


def test_counting_loads_no_torch() -> None:
    code = "import sys, penstock.ir.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert any(op.name == "attention" for op in vocabulary())


def test_what_belongs_to_heads_is_read_once_beside_the_cache() -> None:
    spans, table = [S, S, S, TABLE], tensor("f32", 8, 37)
    plain, extras = of("attention", [Q, KV, *spans], [Q], HEADS), (*HEADS, ("extras", ("distances",)))
    assert of("attention", [Q, KV, *spans, table], [Q], extras) == Cost(plain.bytes + 8 * 37 * 4, plain.flops)


def test_an_activated_product_costs_its_operands_and_its_product() -> None:
    w, b, y = tensor("bf16", 96, 64), tensor("bf16", 96), tensor("bf16", "T", 96)
    want = Cost((8 * 64 + 96 * 64 + 96 + 8 * 96) * 2, 2 * 8 * 96 * 64)
    assert of("linear_activate", [X, w, b], [y], (("act", "gelu"),)) == want
