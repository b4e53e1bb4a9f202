"""What the executor keeps of a text beside the scheduler's record, until it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from penstock.errors import SamplingError
from penstock.grammar.guide import Guide
from penstock.ir.lazy import torch
from penstock.runtime.beams import BeamStream
from penstock.runtime.output import Stream
from penstock.runtime.requests import Sink
from penstock.runtime.schedule.batch import StepPlan
from penstock.runtime.schedule.beams import Candidate
from penstock.runtime.schedule.request import Request
from penstock.runtime.step import Scores
from penstock.runtime.tokens import TokenStream
from penstock.runtime.upload import Source


@dataclass(frozen=True, slots=True)
class Job:
    """One of the texts of an order (`order_id`), made ready. `sink` gets every output if `streaming`, else the last;
    or the error that ended it. `guide`: of a text that is held to a grammar."""

    order_id: str
    request: Request
    stream: Stream | BeamStream
    source: Source
    sink: Sink
    streaming: bool
    guide: Guide | None = None

    def tell(self) -> None:
        """Let the caller know what there is."""
        if isinstance(self.stream, TokenStream):
            self.stream.hear(self.stream)
        else:
            self.sink(self.stream.output())

    def is_of(self, request: Request) -> bool:
        """Whether it is that request's: its id may have been used before, by one of which a step is still in flight."""
        return self.request is request or (request.group is not None and request.group is self.request.group)

    @property
    def is_scored(self) -> bool:
        return isinstance(self.stream, Stream) and self.stream.is_scored

    @property
    def index(self) -> int | None:
        """Of its text; None: of a search, whose texts have no life of their own."""
        return self.stream.index if isinstance(self.stream, Stream) else None

    @property
    def processes(self) -> bool:
        """Whether its logits pass through functions of its own."""
        return bool(self.stream.params.logits_processors)

    def process(self, logits: Any) -> Any:
        """f32[V] on the host, after its functions in their order. Raises what they raise, and SamplingError where one
        gives something else."""
        shape, kind = logits.shape, logits.dtype
        for function in self.stream.params.logits_processors:
            logits = function(list(self.request.output), logits)
            if not _is_like(logits, shape, kind):
                raise SamplingError(f"{function!r} gave no {kind} tensor of shape {tuple(shape)}; give the logits back")
        return logits.detach()


def _is_like(given: object, shape: Any, kind: Any) -> bool:
    """Whether a step can take it for a row of logits."""
    tensor = isinstance(given, torch.Tensor) and given.layout is torch.strided and given.device.type == "cpu"
    return tensor and given.shape == shape and given.dtype == kind  # type: ignore[attr-defined]


def rows_of_prompts(plan: StepPlan) -> Iterator[tuple[Request, int, range]]:
    """Of the chunks that score: the request, the chunk's first position, and its rows of logits."""
    row = len(plan.decoders.requests)
    for chunk in plan.chunks:
        if chunk.request.scores and chunk.num_logits == chunk.num_tokens:
            yield chunk.request, chunk.start, range(row, row + chunk.num_logits)
        row += chunk.num_logits


def candidates_of(plan: StepPlan, scores: Scores) -> list[list[Candidate]]:
    """Of each beam that gets a token, the likeliest ones, as many as its search asks for."""
    return [
        [*zip(scores.top_ids[row, :count].tolist(), scores.top_values[row, :count].tolist(), strict=True)]
        for request, row in zip(plan.sampling, plan.sample_rows, strict=True)
        if request.group is not None
        for count in (request.group.search.num_candidates,)
    ]


def keep_scores(plan: StepPlan, scores: Scores, tokens: list[int], live: Callable[[Request], Job | None]) -> None:
    """Give each text what its rows of logits say, before the tokens that were sampled from them."""
    for request, row in zip(plan.sampling, plan.sample_rows, strict=True):
        job = live(request) if request.controlled else None
        if job is not None and isinstance(job.stream, Stream) and job.stream.is_scored:
            job.stream.score(tokens[row], scores, row)
    for request, start, rows in rows_of_prompts(plan):
        if (job := live(request)) is not None and isinstance(job.stream, Stream):
            job.stream.score_prompt(start, scores, rows)
