"""ModelRunner: an engine directory and text, nothing of the compiler."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from penstock.errors import PenstockError
from penstock.runtime.executor import Submission
from penstock.runtime.loop import Loop, fresh_id
from penstock.runtime.open import Memory, open_loop
from penstock.runtime.requests import RequestOutput, SamplingParams
from penstock.text.tokenizer import Tokenizer


class ModelRunner:
    """Runs an engine built before. Raises EngineMismatch where it was built for another GPU: it does not rebuild."""

    def __init__(self, loop: Loop, tokenizer: Tokenizer) -> None:
        self._loop, self.tokenizer = loop, tokenizer

    @classmethod
    def from_dir(
        cls, engine_dir: str | Path, *, gpu_memory_utilization: float = 0.9, max_gpu_bytes: int | None = None
    ) -> ModelRunner:
        """Open an engine directory; it stands alone, its tokenizer is in it."""
        tokenizer = Tokenizer.from_dir(engine_dir)
        return cls(open_loop(Path(engine_dir), Memory(gpu_memory_utilization, max_gpu_bytes), tokenizer), tokenizer)

    def generate(
        self, input_texts: Sequence[str], max_new_tokens: int = 128, sampling_params: SamplingParams | None = None
    ) -> list[str]:
        """The text that continues each input. `sampling_params`, where given, wins over `max_new_tokens`."""
        params = sampling_params or SamplingParams(max_tokens=max_new_tokens)
        return [output.outputs[0].text for output in self.run(input_texts, params)]

    def run(self, input_texts: Sequence[str], params: SamplingParams) -> list[RequestOutput]:
        """The full outputs, in order."""
        done: queue.SimpleQueue[RequestOutput | PenstockError] = queue.SimpleQueue()
        ids = [tuple(x) for x in self.tokenizer.encode_batch(list(input_texts))]
        new = [Submission(fresh_id(), x, params, done.put, text) for x, text in zip(ids, input_texts, strict=True)]
        for each in new:
            self._loop.submit(each)
        outputs: dict[str, RequestOutput] = {}
        for _ in new:
            result = done.get()
            if isinstance(result, PenstockError):
                raise result
            outputs[result.request_id] = result
        return [outputs[each.id] for each in new]

    def close(self) -> None:
        self._loop.close()
        self._loop.executor.backend.close()

    def __enter__(self) -> ModelRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
