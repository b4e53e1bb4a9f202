"""A submission made ready on any thread: checked, resolved and translated, before the executor hears of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from penstock.engine.manifest import Engine
from penstock.errors import OptionError, SamplingError
from penstock.grammar.compiled import Compiled
from penstock.grammar.guide import Grammars
from penstock.grammar.process import Compiler
from penstock.grammar.vocabulary import Vocabulary, vocabulary_of
from penstock.ir.ops.control import MOST_LOGPROBS, Controls
from penstock.runtime.beams import BeamStream
from penstock.runtime.embedding import check_task
from penstock.runtime.job import Job
from penstock.runtime.output import Stream
from penstock.runtime.prompt import prefix_length, prompt_numbers
from penstock.runtime.requests import SamplingParams, Sink
from penstock.runtime.sampling.resolve import Resolver
from penstock.runtime.sampling.translate import controls_of, fields_of
from penstock.runtime.schedule.beams import BeamRules
from penstock.runtime.schedule.groups import BeamGroup
from penstock.runtime.schedule.request import Request
from penstock.runtime.schedule.scheduler import Scheduler
from penstock.runtime.several import Several
from penstock.runtime.tokens import TokenStream
from penstock.runtime.upload import Numbers, Source, slot_numbers
from penstock.spec import inverse_frequencies
from penstock.text.tokenizer import Tokenizer

_LARGEST = 2**31 - 1
MOST_SECONDS = 1e9


@dataclass(frozen=True, slots=True)
class Submission:
    """A request as it arrives. `sink` gets every output if `streaming`, else the last; or the error that ended it.

    priority: the lower, the sooner. cache_salt: KV is shared only with requests of the same. queue_timeout, timeout:
    seconds from arrival until it must run, and until it must have ended; None: for ever. hear: hears of each text that
    is sampled instead of `sink`, which hears of errors then; texts are token ids, all `best_of` of them. grammar: what
    params.guided_decoding asks for, where it was compiled elsewhere, for the same vocabulary.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    sink: Sink
    prompt: str | None = None
    streaming: bool = False
    priority: int = 0
    cache_salt: str = ""
    queue_timeout: float | None = None
    timeout: float | None = None
    arrival: float = field(default_factory=time.monotonic)
    hear: Callable[[TokenStream], None] | None = None
    grammar: Compiled | None = None

    def __post_init__(self) -> None:
        priority = self.priority
        if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > _LARGEST:
            raise OptionError(f"priority={priority!r} is no integer of 32 bits; the lower, the sooner, 0 is usual")
        if not isinstance(self.cache_salt, str):
            raise OptionError(f"cache_salt={self.cache_salt!r} is a {type(self.cache_salt).__name__}; give a string")
        if any("\ud800" <= character <= "\udfff" for character in self.cache_salt):
            raise OptionError(f"cache_salt={self.cache_salt!r} holds half a character; give valid Unicode")
        for name in ("queue_timeout", "timeout"):
            value = getattr(self, name)
            real = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (real and 0 < value <= MOST_SECONDS):
                raise OptionError(
                    f"{name}={str(value)[:40]} is no number of seconds above 0, at most {MOST_SECONDS:g}; leave it out "
                    f"for no limit"
                )


@dataclass(frozen=True, slots=True)
class Order:
    """A submission made ready."""

    submission: Submission
    jobs: tuple[Job, ...]

    @property
    def id(self) -> str:
        return self.submission.id


class Intake:
    """Makes submissions ready for one engine. Any thread may use it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, scheduler: Scheduler) -> None:
        self._engine, self._tokenizer, self._scheduler = engine, tokenizer, scheduler
        self._resolver = Resolver(engine.tokens.get("generation", {}))
        self._rope = engine.model_spec.request_rope
        ends = tokenizer.eos_token_ids if tokenizer else ()
        self._start = tuple(engine.tokens.get("decoder_start", ()))  # what a decoder begins with, behind an encoder
        self._forced_end: int | None = engine.tokens.get("forced_end")
        self._prefix = engine.tokens["prefix"] if engine.reads_prefix else None  # what sees all of itself ends there
        self._eos = frozenset(engine.tokens.get("eos", ())) | frozenset(ends)
        self._grammars, self._compiler = Grammars(self.vocabulary), Compiler(self.vocabulary)

    def vocabulary(self) -> Vocabulary:
        """What grammars are compiled for. Raises SamplingError where there can be none."""
        return vocabulary_of(self._tokenizer, self._engine.vocab_size, self._eos)

    def prepare(self, new: Submission) -> Order:
        """Raises PromptError, SamplingError and the like."""
        check_task(self._engine, new.params)
        params, notes = self._resolver.resolve(new.params)
        numbers = prompt_numbers(new.prompt_token_ids, self._engine.vocab_size)
        self._refuse_vain(params, len(self._start or numbers))
        grammar = self._grammar(new)
        if params.use_beam_search:
            return Order(new, (self._search(new, params, notes, numbers),))
        if params.width == 1:
            return Order(new, (self._job(new, params, notes, numbers, new.id, new.sink, grammar),))
        if new.streaming and params.width > params.n and new.hear is None:
            raise SamplingError(
                f"best_of={params.width} and n={params.n} cannot be streamed: which are the best is known at the end; "
                f"leave best_of out, or do not stream"
            )
        several = Several(new.id, params.n, params.width, new.sink, new.streaming)
        jobs: list[Job] = []
        for i in range(params.width):
            keys = jobs[0].request.keys if jobs else ()  # one prompt, one salt
            jobs.append(self._job(new, params, notes, numbers, f"{new.id}#{i}", several.sink(i), grammar, i, keys))
        return Order(new, tuple(jobs))

    def _grammar(self, new: Submission) -> Compiled | None:
        """Compiled, in a process of its own; this thread waits for it."""
        if new.grammar is not None:
            new.params.refuse_ends()
            return new.grammar
        guided = new.params.guided_decoding
        return None if guided is None else self._compiler.compile(guided)

    def warm(self) -> None:
        """See `executor.Executor.warm`."""
        self._grammars.warm()

    def close(self) -> None:
        """End what compiles grammars."""
        self._compiler.close()

    def _refuse_vain(self, params: SamplingParams, length: int) -> None:
        """What could be asked for and never had."""
        limits = self._scheduler.limits
        if params.stop and self._tokenizer is None:
            raise SamplingError(f"stop={params.stop!r} needs a tokenizer, and there is none; use stop_token_ids")
        if (self._start or self._prefix) and params.prompt_logprobs is not None:
            reader = "encoder, which reads it," if self._start else "prompt, whose tokens see each other,"
            raise SamplingError(
                f"prompt_logprobs={params.prompt_logprobs} asks how likely the prompt is, and this model's {reader} "
                f"predicts nothing; leave it out"
            )
        room = limits.max_seq_len - length
        if params.min_tokens > room > 0:
            raise SamplingError(
                f"min_tokens={params.min_tokens} behind a prompt of {length} tokens exceeds max_seq_len="
                f"{limits.max_seq_len}; lower it, or shorten the prompt"
            )
        most, texts = limits.max_num_queued_reqs, 1 if params.use_beam_search else params.width
        if most is not None and texts > most:
            raise SamplingError(
                f"{texts} texts of one prompt can never wait where max_num_queued_reqs={most}; lower n or best_of, or "
                f"raise that limit"
            )

    def _job(
        self, new: Submission, params: SamplingParams, notes: tuple[str, ...], numbers: Numbers, id: str, sink: Sink,
        grammar: Compiled | None, index: int = 0, keys: Sequence[bytes] = (),
    ) -> Job:  # fmt: skip
        """One text, its blocks named by `keys`, where those are known."""
        request, freqs = self._request(new, params, id)
        request.scores &= not index  # the prompt is that of all texts
        controls = self._controls(params, request)
        request.lockstep = bool(params.logits_processors)
        request.looks_back = controls.adjusts
        guide = None if grammar is None else self._grammars.guide(grammar)
        asks = request.looks_back or controls.num_logprobs > 0 or guide is not None
        request.controlled = asks or request.lockstep
        request.keys = [*keys]
        self._check(request)
        source = self._source(numbers, fields_of(params, index), freqs, controls, request)
        text = request, new.prompt, params, new.arrival, self._tokenizer, notes, index
        stream = Stream(*text) if new.hear is None else TokenStream(*text, order_id=new.id, hear=new.hear)
        return Job(new.id, request, stream, source, sink, new.streaming, guide)

    def _search(self, new: Submission, params: SamplingParams, notes: tuple[str, ...], numbers: Numbers) -> Job:
        """All beams are one job; the first of them stands for it."""
        pattern, freqs = self._request(new, params, new.id)
        pattern.controlled = True
        controls = self._controls(params, pattern)
        pattern.looks_back = controls.adjusts
        ahead = max(0, len(self._start) - 1)  # forced, which counts as generated
        rules = params.width, params.length_penalty, params.early_stopping, ahead, pattern.forced_end
        group = BeamGroup(pattern, BeamRules(*rules))
        count, most = group.search.num_candidates, min(MOST_LOGPROBS, self._engine.vocab_size)
        if count > most:
            raise SamplingError(
                f"beam_width={params.width} with {len(pattern.end_ids)} tokens that end a text needs the {count} "
                f"likeliest tokens of each beam, at most {most} are known; give fewer beams or stop_token_ids"
            )
        self._check(group.leader)
        controls = replace(controls, num_logprobs=1 + count, by_adjusted=True)
        source = self._source(numbers, fields_of(params), freqs, controls, pattern)
        stream = BeamStream(group, new.prompt, params, new.arrival, self._tokenizer, notes)
        return Job(new.id, group.leader, stream, source, new.sink, False)

    def _request(self, new: Submission, params: SamplingParams, id: str) -> tuple[Request, tuple[float, ...]]:
        """With its rope frequencies, where the model fixes them by the length that a request may reach."""
        assert params.max_tokens is not None
        has_text = params.detokenize and self._tokenizer is not None
        request = Request(
            id, self._start or new.prompt_token_ids, params.max_tokens, self._scheduler.limits.max_seq_len, self._eos,
            frozenset(params.stop_token_ids), params.ignore_eos, hears_all=new.streaming or has_text,
            priority=new.priority, scores=params.prompt_logprobs is not None,
            source=new.prompt_token_ids if self._start else (),
            forced_end=None if params.ignore_eos else self._forced_end,
            whole=prefix_length(new.prompt_token_ids, **self._prefix) if self._prefix else 0,
        )  # fmt: skip
        freqs = tuple(inverse_frequencies(self._rope, request.max_length)) if self._rope else ()
        # A rope of its own makes other KV.
        request.salt = np.array(freqs, np.float32).tobytes() + new.cache_salt.encode()
        return request, freqs

    def _source(
        self,
        numbers: Numbers,
        fields: Mapping[str, float],
        freqs: Sequence[float],
        controls: Controls,
        request: Request,
    ) -> Source:
        own = np.array(controls.numbers, np.int32)
        if not self._start:
            return Source(numbers, slot_numbers(fields, freqs, request.whole or None), own)
        return Source(np.array(self._start, np.int32), slot_numbers(fields, freqs, len(numbers)), own, numbers)

    def _check(self, request: Request) -> None:
        """Refuse it if it could never run; else work out the names of its blocks."""
        self._scheduler.refuse_impossible(request)
        self._scheduler.name_blocks(request)

    def _controls(self, params: SamplingParams, request: Request) -> Controls:
        return controls_of(params, request, self._engine.vocab_size, self._tokenizer)
