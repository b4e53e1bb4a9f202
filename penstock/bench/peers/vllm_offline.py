"""vLLM on a workload, where it is installed: dummy weights, token ids, prefix caching off."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from penstock.bench.peers.task import Answer, Task, decode_rate, first_tokens, serve
from penstock.ir.lazy import torch

UTILIZATION = 0.85
MISSING = "vllm is not installed here; pip install vllm in this environment, or leave it out of --against"


def measure(task: Task) -> Answer:
    """Raises whatever vLLM raises."""
    if importlib.util.find_spec("vllm") is None:
        return Answer(refused=MISSING)
    vllm: Any = importlib.import_module("vllm")
    llm = vllm.LLM(
        model=task.model, load_format="dummy", skip_tokenizer_init=True, dtype=task.dtype, seed=0,
        max_model_len=task.longest, gpu_memory_utilization=UTILIZATION, enable_prefix_caching=False,
    )  # fmt: skip

    def run(ids: list[int], new: int, temperature: float = 0.0) -> None:
        params = vllm.SamplingParams(
            max_tokens=new, min_tokens=new, ignore_eos=True, temperature=temperature, detokenize=False
        )
        llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)

    ttft, p99 = first_tokens(task, lambda ids: run(ids, 1, 0.7))
    free, total = torch.cuda.mem_get_info()
    return Answer(ttft, p99, decode_rate(task, run), (total - free) / 1e9, f"vllm {vllm.__version__}")


if __name__ == "__main__":
    serve(measure)
