"""Worker under TRITON_INTERPRET=1: attention must not depend on what lies behind a context, be it NaN."""

from __future__ import annotations

import torch

from penstock.engine.device import H200
from penstock.kernels.attention.ragged import Ragged
from tests.kernels import interpreted
from tests.kernels.cases.attention import FP8, attention, examples, sizes
from tests.kernels.subprocess_cases import poisoned


def main() -> None:
    interpreted.patch()
    for pool in ("", FP8):
        _check(pool)
    print("equal")


def _check(pool: str) -> None:
    site, at = attention("bf16", 4, 1, 64, window=70, pool=pool), sizes(13, 4, 3)
    draft = Ragged().plan(site, at, H200, Ragged().tunables(site, at, H200)[0])
    for q, kv, *rest in examples(site, at, torch.Generator().manual_seed(0)):
        stale = kv.float()
        live = torch.zeros(kv.shape[0], kv.shape[3], dtype=torch.bool)
        for count, context, blocks in zip(rest[1].tolist(), rest[2].tolist(), rest[3], strict=True):
            for position in range(max(0, context - count - 69), context if count else 0):
                live[blocks[position // 64], position % 64] = True
        stale.permute(0, 3, 1, 2, 4)[~live] = torch.nan
        stale = stale.to(kv.dtype)
        results = []
        for cache in (kv, stale):
            tensors = [q, cache, *rest]
            results.append(poisoned(site, at, tensors))
            interpreted.run(draft, tensors, results[-1])
        assert results[0][0].equal(results[1][0]) and results[0][0].isfinite().all()


if __name__ == "__main__":
    main()
