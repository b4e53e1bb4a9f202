"""LLM: build the engine if needed, then run it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from penstock import bundled
from penstock.compiler.options import FORMATS, BuildOptions
from penstock.compiler.progress import Progress, silent
from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.engine.match import mismatch
from penstock.engine.place import cache_root
from penstock.errors import ExecutorError, OptionError, PenstockError, SamplingError
from penstock.kernels.device import detect, software
from penstock.models.hub import resolve
from penstock.plugins import load as load_plugins
from penstock.runtime.embedding import Pooled, Vector
from penstock.runtime.intake import Submission
from penstock.runtime.loop import Gather, Loop, fresh_id, run_all
from penstock.runtime.open import Memory, RunLimits, open_loop
from penstock.runtime.prompt import Prompt, params_of, prompts_of, read_prompt
from penstock.runtime.requests import LoRARequest, RequestOutput, SamplingParams
from penstock.runtime.stream import TextStream
from penstock.runtime.values import Watch
from penstock.text.tokenizer import Tokenizer
from penstock.unsupported import refuse, require_default

Mixture = LoRARequest | Sequence[tuple[str, float]] | None  # an adapter, weighted adapters, or the base model


class LLM:
    """A model, ready to generate. Use as a context manager, or call `shutdown`.

    model: a Hugging Face directory, a Penstock checkpoint, an engine directory, what `penstock.compile` made, or a hub
    name; None: the bundled model.
    revision, token: for hub names. weights: "checkpoint", or "random" for the shapes of a config alone.
    dtype: "auto", "bfloat16", "float16", "float32". device: "auto", "cuda", "cpu".
    kv_cache_dtype: what KV is kept in: "auto", the type that the model computes in; "fp8", half the bytes of 16 bits.
    task: "generate"; "embed": give vectors, no head; "auto": embed where the files of sentence-transformers say so.
    max_batch_size, max_num_tokens, max_seq_len: limits of a step and of a request; None: what fits model and device, or
    what the engine was built for, above which an engine directory cannot go.
    gpu_memory_utilization, max_gpu_bytes: how much of the GPU may be used.
    enable_prefix_caching: compute the KV of equal prefixes once. max_num_queued_reqs, max_num_queued_tokens: how many
    requests, and tokens of their prompts, may wait before QueueFullError is raised; None: any.
    host_cache_size: bytes of the host's memory for KV that had to make room and may be wanted again; 0: none.
    inter_token_latency_target: seconds between tokens that others' prompts may not stretch, where they can go slower.
    tokenizer: a directory, where the model's own is elsewhere; skip_tokenizer_init: token ids in and out.
    cache_dir: where engines and timings are kept. tactics: {op: tactic}, pinned. progress(stage, done, total).
    plugins: modules that register parts of their own when they are imported; installed ones are loaded always.
    quantization, tensor_parallel_size, pipeline_parallel_size, lora_paths, max_loras, max_lora_rank, speculative: not
    built yet; UnsupportedError for anything but their defaults.

    Raises OptionError for an unknown argument, or one that an engine directory contradicts; ModelError, TokenizerError
    and CheckpointError where the model cannot be read, ResourceError where memory or disk does not suffice: all before
    any text is generated.
    """

    def __init__(
        self,
        model: str | Path | Engine | None = None,
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
        enable_prefix_caching: bool = True,
        max_num_queued_reqs: int | None = None,
        max_num_queued_tokens: int | None = None,
        inter_token_latency_target: float | None = None,
        host_cache_size: int = 0,
        tokenizer: str | Path | None = None,
        skip_tokenizer_init: bool = False,
        cache_dir: str | Path | None = None,
        tactics: Mapping[str, str] | None = None,
        plugins: Sequence[str] = (),
        progress: Progress = silent,
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        task: str = "auto",
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        lora_paths: Sequence[str | Path] | None = None,
        max_loras: int | None = None,
        max_lora_rank: int | None = None,
        speculative: object | None = None,
        **unknown: object,
    ) -> None:
        _refuse_unknown("LLM", unknown)
        adapters = {"lora_paths": lora_paths, "max_loras": max_loras, "max_lora_rank": max_lora_rank}
        _refuse_unbuilt(None, quantization=quantization, speculative=speculative, **adapters)
        _refuse_unbuilt(1, tensor_parallel_size=tensor_parallel_size, pipeline_parallel_size=pipeline_parallel_size)
        load_plugins(plugins)
        self._memory = Memory(gpu_memory_utilization, max_gpu_bytes)
        limits, queued = (max_batch_size, max_num_tokens, max_seq_len), (max_num_queued_reqs, max_num_queued_tokens)
        self._limits = RunLimits(*limits, *queued, enable_prefix_caching, inter_token_latency_target, host_cache_size)
        self._text_home = None if tokenizer is None else Path(tokenizer)
        self._skip_tokenizer, self._progress = skip_tokenizer_init, progress
        self._root = cache_root(cache_dir)
        options = BuildOptions(
            dtype, weights, device, *limits, pins=tactics or {}, cache_dir=self._root, kv_cache_dtype=kv_cache_dtype,
            task=task,
        )  # fmt: skip
        self._memory.check_for(detect(device).kind)
        path = _located(model, revision, token)
        self.tokenizer = self._read_tokenizer(path)  # before a build, so that a bad one costs nothing
        self.engine_dir, engine = _engine_of(path, options, self._limits, progress)
        self._loop = self._open(self.engine_dir, engine)
        progress("ready", 1, 1)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: Mixture | Sequence[Mixture] = None,
        lora_indices: Sequence[int | None] | None = None,
        priority: int = 0,
        cache_salt: str = "",
        queue_timeout: float | None = None,
        timeout: float | None = None,
        **unknown: object,
    ) -> list[RequestOutput]:
        """The completions of prompts, in their order. A prompt is text, or {"prompt_token_ids": [...]}.

        sampling_params: one for all, or one for each; what they leave open is taken from the model's
        generation_config, and each output's `notes` say what that was. priority: the lower, the sooner. cache_salt: KV
        of equal prefixes is shared with requests of the same alone. queue_timeout, timeout: seconds until a request
        must run, and must have ended; else it ends with what it has and finish_reason "timeout". lora_request,
        lora_indices: not built yet. Raises PromptError, SamplingError before any prompt is started.
        """
        _refuse_unknown("generate", unknown)
        _refuse_unbuilt(None, lora_request=lora_request, lora_indices=lora_indices)
        many = prompts_of(prompts)
        params = params_of(sampling_params, len(many))
        gather, how = Gather(len(many)), (priority, cache_salt, queue_timeout, timeout)
        new = [self._submission(p, s, gather.put, False, *how) for p, s in zip(many, params, strict=True)]
        return run_all(self._loop, new, gather)

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, priority: int = 0, cache_salt: str = "",
        queue_timeout: float | None = None, timeout: float | None = None, **unknown: object,
    ) -> list[Vector]:  # fmt: skip
        """The vectors of prompts, f32[E] each, in their order: what the final norm gives for the last token, of length
        1 unless the model's files leave that out. The rest as for `generate`.

        Raises OptionError where the engine was not built with task="embed", ExecutorError where a deadline came first.
        """
        _refuse_unknown("embed", unknown)
        many, how = prompts_of(prompts), (priority, cache_salt, queue_timeout, timeout)
        gather, pooled = Gather(len(many)), [Pooled(self.engine) for _ in many]
        new = [self._submission(p, s.params, gather.put, False, *how) for p, s in zip(many, pooled, strict=True)]
        run_all(self._loop, new, gather)
        if len(found := [vector for each in pooled if (vector := each.vector) is not None]) < len(many):
            raise ExecutorError(f"{len(many) - len(found)} of {len(many)} prompts met their deadline; allow more time")
        return found

    async def generate_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = True,
        lora_request: Mixture = None,
        priority: int = 0,
        cache_salt: str = "",
        queue_timeout: float | None = None,
        timeout: float | None = None,
        **unknown: object,
    ) -> AsyncIterator[RequestOutput]:
        """Outputs as they grow: each holds the text so far; `streaming=False`: only the last. Leaving early cancels.

        The rest as for `generate`.
        """
        _refuse_unknown("generate_async", unknown)
        _refuse_unbuilt(None, lora_request=lora_request)
        loop = asyncio.get_running_loop()
        parts: asyncio.Queue[RequestOutput | PenstockError] = asyncio.Queue()

        def sink(part: RequestOutput | PenstockError) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, part)

        how = priority, cache_salt, queue_timeout, timeout
        new = self._submission(prompt, sampling_params or SamplingParams(), sink, streaming, *how)
        finished = False
        try:
            await asyncio.to_thread(self._loop.submit, new)
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

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        queue_timeout: float | None = None,
        timeout: float | None = None,
    ) -> TextStream:
        """The text of one prompt piece by piece, for a plain loop: `for piece in llm.stream("Once"): ...`.

        Of several texts the first; `output` of what is returned holds all. The rest as for `generate`.
        """
        how = priority, cache_salt, queue_timeout, timeout
        return TextStream(self._loop, self._submission, prompt, sampling_params or SamplingParams(), *how)

    def save_engine(self, directory: str | Path) -> Path:
        """Copy the engine to a directory of its own; `LLM(directory)` opens it anywhere."""
        target = Path(directory)
        with store.writing(target) as part:
            shutil.copytree(self.engine_dir, part, dirs_exist_ok=True)
        return target

    def refit(self, checkpoint: str | Path) -> None:
        """Swap in other weights of the same spec; nothing is timed or compiled. Raises RefitError for any other.

        The engine goes into the cache under a name of its own; the one that was open stays as it was, and is opened
        again where the new one cannot be. Requests still running end with an error.
        """
        from penstock.compiler.refit import refit

        refitted = refit(self.engine_dir, resolve(checkpoint), progress=self._progress, cache=self._root / "engines")
        tokenizer, old = self._read_tokenizer(refitted), (self.tokenizer, self.engine_dir)
        self._loop.close()  # first, so that the device holds one set of weights at a time
        self.tokenizer, self.engine_dir = tokenizer, refitted
        try:
            self._loop = self._open(refitted)
        except BaseException:  # of any kind: whoever catches it still has a model
            self.tokenizer, self.engine_dir = old
            self._loop = self._open(self.engine_dir)
            raise

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and how full the KV pool is.

        host_us_per_step: CPU time of the executor's thread between a read's end and the next launch's, microseconds,
        the mean of all steps; host_seconds and host_steps, of which it is made, give the mean between two calls.
        prefix_cache_hits of prefix_cache_queries: tokens of admitted prompts whose KV was found. host_cache_hits:
        tokens whose KV came back from the host's memory, of requests computed anew as well; host_cache_usage: share of
        host_cache_blocks that hold some. kv_cache_usage: share of the blocks that is held, of the group of layers that
        has least left; kv_groups: of each. kv_cache_waste: share of the room in held blocks without a token in it.
        device_busy: share of the time with requests in which a step was under way, as the host sees it.
        device_seconds: of steps under way; roof_seconds: the least they could have taken, None where it is not known.
        controlled_steps: whose rows had penalties, bans or log-probabilities. steps_off_fast_path: that waited for
        logits processors or a capture, ran in a larger bucket or node by node.
        load_seconds: of opening the engine, by stage, some beside each other. memory: the plan in bytes, on a GPU.
        """
        return self._loop.snapshot()

    @property
    def engine(self) -> Engine:
        """The manifest of the engine that runs."""
        return self._loop.executor.engine

    def watch(self, patterns: Sequence[str], steps: int = 1) -> Watch:
        """Keep the values of the next steps whose names, as graph.txt prints them, match any pattern (`%12`, `logits`,
        `attention`, `forward/*`). Those steps run node by node, which is slow; the text stays the same.

        Raises OptionError for a pattern that matches nothing, for `steps` that are no integer from 1, and while an
        earlier watch has not seen all of its own: there is one at a time.
        """
        watch = Watch(self.engine, patterns, steps)
        self._loop.call(lambda: watch.start(self._loop.executor.backend))
        return watch

    def add_lora(self, name: str, path: str | Path) -> None:
        """Not built yet."""
        refuse("add_lora", name)

    def remove_lora(self, name: str) -> None:
        """Not built yet."""
        refuse("remove_lora", name)

    def shutdown(self) -> None:
        """Stop the executor and free the device. Requests still running end with an error."""
        self._loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _read_tokenizer(self, directory: Path) -> Tokenizer | None:
        """The one that was named, or the one of the directory."""
        return None if self._skip_tokenizer else Tokenizer.from_dir(self._text_home or directory)

    def _open(self, directory: Path, engine: Engine | None = None) -> Loop:
        """`engine`: of that directory, where it was read already."""

        def say(text: str) -> None:
            self._progress(text, 0, 0)

        return open_loop(directory, self._memory, self.tokenizer, self._limits, engine, say)

    def _submission(
        self, prompt: Prompt, params: SamplingParams, sink: Any, streaming: bool = False, *how: Any
    ) -> Submission:
        if not isinstance(params, SamplingParams):
            raise SamplingError(f"sampling_params={params!r} is a {type(params).__name__}; give SamplingParams(...)")
        text, ids = read_prompt(prompt, self.tokenizer)
        return Submission(fresh_id(), ids, params, sink, text, streaming, *how)


def _refuse_unknown(where: str, unknown: Mapping[str, object]) -> None:
    for name, value in unknown.items():
        raise OptionError(f"unknown argument {name}={value!r}; see the docstring of {where} for those it takes")


def _refuse_unbuilt(neutral: object, **asked: object) -> None:
    """Names of the public surface that are not built yet take only the value that asks for nothing."""
    for name, value in asked.items():
        require_default(name, value, neutral)


def _located(model: str | Path | Engine | None, revision: str | None, token: str | None) -> Path:
    if model is None:
        return bundled.target()
    if isinstance(model, Engine):
        if model.directory is None:
            raise OptionError("an Engine that was not read from a directory has no weights; name its directory")
        return model.directory
    path = Path(model).expanduser()
    if revision is not None and store.is_engine(path):
        raise OptionError(f"revision={revision!r} is for hub names, and {path} is an engine directory; leave it out")
    return resolve(model, revision, token)


def _engine_of(path: Path, options: BuildOptions, limits: RunLimits, progress: Progress) -> tuple[Path, Engine | None]:
    """The engine of a model, built if needed. An engine directory as it is where it fits this machine, with its
    manifest, since that was read; otherwise with its tactics selected anew. Imports the compiler only for work."""
    if not store.is_engine(path):
        from penstock.compiler.build import build

        return build(path, options, None, progress), None
    engine, device = store.load(path), detect(options.device)
    limits.within(engine.profile)
    _check_given(engine, path, options)
    reason = mismatch(engine, device, software(device))
    if reason is None:
        _check_tactics(engine, path, options.pins)
        return path, engine
    from penstock.compiler.reselect import reselect

    progress(f"selecting tactics anew: {reason}", 0, 0)
    return reselect(path, device, options.cache_dir, options.pins, progress), None


def _check_given(engine: Engine, path: Path, options: BuildOptions) -> None:
    """What an engine directory settled when it was built may be repeated, not changed."""
    has = engine.source.get("weights", "checkpoint")
    if options.dtype != "auto" and FORMATS[options.dtype] != engine.format:
        raise OptionError(
            f"dtype={options.dtype!r}, but the engine in {path} computes in {engine.format}; leave it out, or build "
            f"an engine of that type from the checkpoint"
        )
    options.check_kv(engine, str(path))
    options.check_task(engine, str(path))
    if options.weights == "random" and has != "random":
        raise OptionError(
            f"weights='random', but the engine in {path} has the weights of a checkpoint; leave it out, or build an "
            f"engine of random ones from the model directory"
        )


def _check_tactics(engine: Engine, path: Path, pins: Mapping[str, str]) -> None:
    has = engine.source.get("tactics", {})
    if pins and dict(pins) != has:
        raise OptionError(
            f"tactics={dict(pins)}, but the engine in {path} was built with {has or 'none pinned'}; leave them out, or "
            f"build an engine with them from the checkpoint"
        )
