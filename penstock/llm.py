"""LLM: build the engine if needed, then run it."""

from __future__ import annotations

import asyncio
import queue
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from penstock import bundled
from penstock.compiler.backend import Progress
from penstock.compiler.build import build, silent
from penstock.compiler.options import BuildOptions
from penstock.compiler.refit import refit
from penstock.compiler.reselect import reselect
from penstock.engine import store
from penstock.engine.match import mismatch
from penstock.errors import OptionError, PenstockError, PromptError
from penstock.kernels.device import detect, software
from penstock.models.hub import resolve
from penstock.runtime.executor import Submission
from penstock.runtime.loop import Loop, fresh_id
from penstock.runtime.open import Memory, open_loop
from penstock.runtime.output import delta
from penstock.runtime.requests import RequestOutput, SamplingParams
from penstock.text.tokenizer import Tokenizer
from penstock.unsupported import refuse, require_default

Prompt = str | Mapping[str, Sequence[int]]

# Arguments of the public surface that are not built yet, with the value that means "not asked for".
_NEUTRAL: Mapping[str, Any] = {
    "quantization": None,
    "kv_cache_dtype": "auto",
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "lora_paths": None,
    "max_loras": None,
    "max_lora_rank": None,
    "speculative": None,
}


class LLM:
    """A model, ready to generate. Use as a context manager, or call `shutdown`.

    model: a Hugging Face directory, a Penstock checkpoint, an engine directory, or a hub name; None: the bundled model.
    revision, token: for hub names. weights: "checkpoint", or "random" for the shapes of a config alone.
    dtype: "auto", "bfloat16", "float16", "float32". device: "auto", "cuda", "cpu".
    max_batch_size, max_num_tokens, max_seq_len: limits of a step and of a request; None: what fits model and device.
    gpu_memory_utilization, max_gpu_bytes: how much of the GPU may be used.
    tokenizer: a directory, where the model's own is elsewhere; skip_tokenizer_init: token ids in and out.
    cache_dir: where engines and timings are kept. tactics: {op: tactic}, pinned. progress(stage, done, total).

    Raises OptionError for an unknown argument, ModelError and CheckpointError where the model cannot be read,
    ResourceError where memory or disk does not suffice: all before any text is generated.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        weights: str = "checkpoint",
        dtype: str = "auto",
        device: str = "auto",
        max_batch_size: int | None = None,
        max_num_tokens: int | None = None,
        max_seq_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_gpu_bytes: int | None = None,
        tokenizer: str | Path | None = None,
        skip_tokenizer_init: bool = False,
        cache_dir: str | Path | None = None,
        tactics: Mapping[str, str] | None = None,
        progress: Progress = silent,
        **others: Any,
    ) -> None:
        _check_others(others)
        memory = Memory(gpu_memory_utilization, max_gpu_bytes)
        options = BuildOptions(
            dtype, weights, device, max_batch_size, max_num_tokens, max_seq_len,
            pins=tactics or {}, cache_dir=Path(cache_dir) if cache_dir is not None else None,
        )  # fmt: skip
        path = bundled.target() if model is None else resolve(model, revision, token)
        self.engine_dir = (
            _matching(path, options, progress) if store.is_engine(path) else build(path, options, None, progress)
        )
        self.tokenizer = (
            None if skip_tokenizer_init else Tokenizer.from_dir(tokenizer or _text_home(path, self.engine_dir))
        )
        self._memory, self._options, self._progress = memory, options, progress
        self._loop: Loop = open_loop(self.engine_dir, memory, self.tokenizer)
        progress("ready", 1, 1)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """The completions of prompts, in their order. A prompt is text, or {"prompt_token_ids": [...]}.

        sampling_params: one for all, or one for each. Raises PromptError, SamplingError before any prompt is started.
        """
        _check_others(others)
        many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = _each(sampling_params, len(many))
        done: queue.SimpleQueue[RequestOutput | PenstockError] = queue.SimpleQueue()
        new = [self._submission(p, s, done.put) for p, s in zip(many, params, strict=True)]
        self._submit_all(new)
        outputs: dict[str, RequestOutput] = {}
        for _ in new:
            result = done.get()
            if isinstance(result, PenstockError):
                for each in new:
                    self._loop.abort(each.id)
                raise result
            outputs[result.request_id] = result
        return [outputs[each.id] for each in new]

    async def generate_async(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, streaming: bool = True, **others: Any
    ) -> AsyncIterator[RequestOutput]:
        """Outputs as they grow: each holds the text so far; `streaming=False`: only the last. Leaving early cancels."""
        _check_others(others)
        loop = asyncio.get_running_loop()
        parts: asyncio.Queue[RequestOutput | PenstockError] = asyncio.Queue()

        def sink(part: RequestOutput | PenstockError) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, part)

        new = self._submission(prompt, sampling_params or SamplingParams(), sink, streaming)
        await asyncio.to_thread(self._loop.submit, new)
        finished = False
        try:
            while not finished:
                part = await parts.get()
                if isinstance(part, PenstockError):
                    finished = True
                    raise part
                finished = part.finished
                yield part
        finally:
            if not finished:
                await asyncio.to_thread(self._loop.abort, new.id)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Stream:
        """The text of one prompt piece by piece, for a plain loop: `for piece in llm.stream("Once"): ...`."""
        return Stream(self._loop, self._submission, prompt, sampling_params or SamplingParams())

    def save_engine(self, directory: str | Path) -> Path:
        """Copy the engine to a directory of its own; `LLM(directory)` opens it anywhere."""
        target = Path(directory)
        with store.writing(target) as part:
            shutil.copytree(self.engine_dir, part, dirs_exist_ok=True)
        return target

    def refit(self, checkpoint: str | Path) -> None:
        """Swap in other weights of the same spec; nothing is timed or compiled. Raises RefitError for any other."""
        refitted = refit(self.engine_dir, resolve(checkpoint), progress=self._progress)
        self._loop.close()
        self._loop.executor.backend.close()
        self.engine_dir = refitted
        self._loop = open_loop(self.engine_dir, self._memory, self.tokenizer)

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and how full the KV pool is."""
        executor = self._loop.executor
        counters = executor.stats
        return {
            "steps": counters.steps,
            "requests": counters.requests,
            "prompt_tokens": counters.prompt_tokens,
            "generated_tokens": counters.generated_tokens,
            "requests_running": executor.scheduler.num_running,
            "requests_waiting": executor.scheduler.num_waiting,
            "kv_cache_usage": executor.kv.usage,
            "kv_blocks": executor.kv.pool.num_usable,
        }

    def add_lora(self, name: str, path: str | Path) -> None:
        """Not built yet."""
        refuse("add_lora", name)

    def remove_lora(self, name: str) -> None:
        """Not built yet."""
        refuse("remove_lora", name)

    def shutdown(self) -> None:
        """Stop the executor and free the device. Requests still running end with an error."""
        self._loop.close()
        self._loop.executor.backend.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _submission(self, prompt: Prompt, params: SamplingParams, sink: Any, streaming: bool = False) -> Submission:
        text, ids = _ids_of(prompt, self.tokenizer)
        return Submission(fresh_id(), ids, params, sink, text, streaming)

    def _submit_all(self, new: Sequence[Submission]) -> None:
        """All of them or none: a refusal takes the others back before they run."""

        def work() -> None:
            for index, each in enumerate(new):
                try:
                    self._loop.executor.submit(each)
                except PenstockError:
                    for other in new[:index]:
                        self._loop.executor.abort(other.id)
                    raise

        self._loop.call(work)


class Stream:
    """An iterator over the new text of one request; closing it early cancels the request."""

    def __init__(self, loop: Loop, submission: Any, prompt: Prompt, params: SamplingParams) -> None:
        self._parts: queue.SimpleQueue[RequestOutput | PenstockError] = queue.SimpleQueue()
        new = submission(prompt, params, self._parts.put, True)
        self._loop, self._id = loop, new.id
        self.output: RequestOutput | None = None  # the whole output so far
        loop.submit(new)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        if self.output is not None and self.output.finished:
            raise StopIteration
        part = self._parts.get()
        if isinstance(part, PenstockError):
            raise part
        piece = delta(self.output, part).outputs[0].text
        self.output = part
        return piece

    def close(self) -> None:
        """Cancel what is left."""
        self._loop.abort(self._id)


def _check_others(others: Mapping[str, Any]) -> None:
    """Names of the public surface that are not built yet are refused by name, unknown ones as unknown."""
    for name, value in others.items():
        if name in _NEUTRAL:
            require_default(name, value, _NEUTRAL[name])
        elif name in ("lora_request", "lora_indices"):
            require_default(name, value, None)
        else:
            raise OptionError(f"unknown argument {name}={value!r}; see the docstring of LLM for those it takes")


def _ids_of(prompt: Prompt, tokenizer: Tokenizer | None) -> tuple[str | None, tuple[int, ...]]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise PromptError("the prompt is text and there is no tokenizer; give {'prompt_token_ids': [...]}")
        return prompt, tuple(tokenizer.encode(prompt))
    if not isinstance(prompt, Mapping) or set(prompt) != {"prompt_token_ids"}:
        raise PromptError(f"prompt {str(prompt)[:80]!r} is neither text nor {{'prompt_token_ids': [...]}}")
    return None, tuple(prompt["prompt_token_ids"])


def _each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise OptionError(f"{len(params)} sampling_params were given for {count} prompts; give one, or one for each")
    return params


def _text_home(path: Path, engine_dir: Path) -> Path:
    return path if (path / "tokenizer.json").is_file() else engine_dir


def _matching(path: Path, options: BuildOptions, progress: Progress) -> Path:
    """An engine directory as it is where it fits this machine; otherwise with its tactics selected anew."""
    device = detect(options.device)
    if reason := mismatch(store.load(path), device, software(device)):
        progress(f"selecting tactics anew: {reason}", 0, 0)
        return reselect(path, device, options.cache_dir, options.pins, progress)
    return path
