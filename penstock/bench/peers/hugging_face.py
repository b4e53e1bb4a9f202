"""Hugging Face transformers on a workload: eager, compiled, as CUDA graphs, and both. The only import of it.

Tokens are made in a plain loop of forward calls, which asks less of the host than `generate` does. All ways but eager
use the static cache. `compile` is torch.compile, `cudagraph` the model's own kernels captured by torch.cuda.graph (a
graph for each prompt length and one for the decode step), `compile+cudagraph` is mode="reduce-overhead".
"""

from __future__ import annotations

import importlib.util
import resource
from collections.abc import Callable
from typing import Any

from penstock.bench.peers.task import Answer, Task, decode_rate, first_tokens, serve
from penstock.ir.lazy import torch

TEMPERATURE = 0.7
MISSING = (
    "transformers is not installed here; in Penstock's checkout: pip install -e '.[bench]'; "
    "or leave it out of --against"
)
Forward = Callable[[Any], Any]  # ids [1,n] -> logits of the last position [1,V]


class Runner:
    """One model and one way to run it, a request at a time."""

    def __init__(self, task: Task) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

        self.device = task.device
        config = AutoConfig.from_pretrained(task.model)
        with torch.device(task.device):
            make: Any = AutoModelForCausalLM.from_config
            self.model = make(config, dtype=getattr(torch, task.dtype)).eval()
        self._fresh = DynamicCache if task.way == "eager" else None
        self.cache: Any = DynamicCache() if self._fresh else StaticCache(config, max_cache_len=task.longest)
        self.forward(self.tensor([0]))  # makes the static cache's memory, which no graph may
        self.prefill, self.decode = self._ways(task.way)

    def _ways(self, way: str) -> tuple[Forward, Forward]:
        if way == "eager":
            return self.forward, self.forward
        if way == "cudagraph":
            graphs = Graphs(self.forward, self.reset)
            return graphs, graphs
        mode = "reduce-overhead" if "cudagraph" in way else None
        return torch.compile(self.forward, mode=mode, dynamic=True), torch.compile(self.forward, mode=mode)

    def forward(self, ids: Any) -> Any:
        return self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def reset(self) -> None:
        """Forget the tokens."""
        if self._fresh:
            self.cache = self._fresh()
        else:
            self.cache.reset()

    def tensor(self, ids: list[int]) -> Any:
        return torch.tensor([ids], device=self.device)

    def first(self, ids: list[int]) -> int:
        """The first token behind a prompt, sampled."""
        self.reset()
        logits = self.prefill(self.tensor(ids)).float()
        return int(torch.multinomial(torch.softmax(logits[0] / TEMPERATURE, -1), 1).item())

    def generate(self, ids: list[int], new: int) -> list[int]:
        """Greedy tokens behind a prompt."""
        self.reset()
        token = self.prefill(self.tensor(ids)).argmax(-1, keepdim=True)
        tokens = [token]
        for _ in range(new - 1):
            torch.compiler.cudagraph_mark_step_begin()
            tokens.append(token := self.decode(token).argmax(-1, keepdim=True))
        return [int(t) for t in torch.cat(tokens, 1)[0].tolist()]


class Graphs:
    """A CUDA graph for each number of tokens, captured when it is first asked for."""

    def __init__(self, forward: Forward, reset: Callable[[], None]) -> None:
        self._forward, self._reset = forward, reset
        self._captured: dict[int, tuple[Any, Any, Any]] = {}

    def __call__(self, ids: Any) -> Any:
        if ids.shape[1] not in self._captured:
            self._captured[ids.shape[1]] = self._capture(ids.clone())
        graph, inputs, logits = self._captured[ids.shape[1]]
        inputs.copy_(ids)
        graph.replay()
        return logits

    def _capture(self, inputs: Any) -> tuple[Any, Any, Any]:
        """The first request of a length runs behind tokens that the captures left in the cache; none is measured."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._reset()
                self._forward(inputs)
            self._reset()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._forward(inputs)
        return graph, inputs, logits


def measure(task: Task) -> Answer:
    """The answer of one way. Raises whatever transformers or torch raise."""
    if importlib.util.find_spec("transformers") is None:
        return Answer(refused=MISSING)
    import transformers

    if task.device != "cuda" and "cudagraph" in task.way:
        return Answer(refused="CUDA graphs need a GPU")
    with torch.no_grad():
        runner = Runner(task)
        ttft, p99 = first_tokens(task, runner.first)
        rate = decode_rate(task, runner.generate)
    if task.device == "cuda":
        memory = float(torch.cuda.max_memory_allocated())
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return Answer(ttft, p99, rate, memory / 1e9, f"transformers {transformers.__version__}")


if __name__ == "__main__":
    serve(measure)
