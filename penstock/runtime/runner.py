"""ModelRunner: an engine directory and text, nothing of the compiler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from penstock.errors import OptionError
from penstock.plugins import load as load_plugins
from penstock.runtime.intake import Submission
from penstock.runtime.loop import Gather, Loop, fresh_id, run_all
from penstock.runtime.open import Memory, open_loop
from penstock.runtime.requests import RequestOutput, SamplingParams
from penstock.text.tokenizer import Tokenizer

NEW_TOKENS = 128  # for each input, unless told otherwise


class ModelRunner:
    """Runs an engine built before. Raises EngineMismatch where it was built for another GPU: it does not rebuild."""

    def __init__(self, loop: Loop, tokenizer: Tokenizer) -> None:
        self._loop, self.tokenizer = loop, tokenizer

    @classmethod
    def from_dir(
        cls, engine_dir: str | Path, *, gpu_memory_utilization: float = 0.9, max_gpu_bytes: int | None = None,
        plugins: Sequence[str] = (),
    ) -> ModelRunner:  # fmt: skip
        """Open an engine directory; it stands alone, its tokenizer is in it. `plugins`: modules that it needs."""
        load_plugins(plugins)
        tokenizer = Tokenizer.from_dir(engine_dir)
        return cls(open_loop(Path(engine_dir), Memory(gpu_memory_utilization, max_gpu_bytes), tokenizer), tokenizer)

    def generate(
        self,
        input_texts: Sequence[str],
        max_new_tokens: int | None = None,
        sampling_params: SamplingParams | None = None,
    ) -> list[str]:
        """The text that continues each input: at most max_new_tokens (128) each, or as sampling_params say.

        Raises OptionError where both are given, PromptError and SamplingError before any text is started.
        """
        if max_new_tokens is not None and sampling_params is not None:
            raise OptionError(
                f"max_new_tokens={max_new_tokens} was given beside sampling_params; give one, or SamplingParams("
                f"max_tokens={max_new_tokens}, ...)"
            )
        params = sampling_params or SamplingParams(max_tokens=NEW_TOKENS if max_new_tokens is None else max_new_tokens)
        return [output.outputs[0].text for output in self.run(input_texts, params)]

    def run(self, input_texts: Sequence[str], params: SamplingParams) -> list[RequestOutput]:
        """The full outputs, in order: all texts are run, or none."""
        gather = Gather(len(input_texts))
        ids = [tuple(x) for x in self.tokenizer.encode_batch(list(input_texts))]
        new = [Submission(fresh_id(), x, params, gather.put, text) for x, text in zip(ids, input_texts, strict=True)]
        return run_all(self._loop, new, gather)

    def close(self) -> None:
        """Stop the executor and free the device."""
        self._loop.close()

    def __enter__(self) -> ModelRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
