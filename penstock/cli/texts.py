"""Sampling parameters from flags; and texts with their scores, as people and as programs read them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.cli import flags
from penstock.cli.console import table
from penstock.errors import OptionError

if TYPE_CHECKING:
    from penstock.grammar import GuidedDecoding
    from penstock.runtime.requests import CompletionOutput, RequestOutput, SamplingParams
    from penstock.text.tokenizer import Tokenizer


def sampling(
    n: int | None = None, beams: int | None = None, length_penalty: float | None = None, **others: Any
) -> SamplingParams:
    """Of the flags that were given; all beams are wanted where nothing is said. Raises OptionError, SamplingError."""
    from penstock.runtime.sampling.params import SamplingParams
    from penstock.runtime.schedule.groups import MOST_BEAMS

    asked = dict(flags.given(n=n, length_penalty=length_penalty, **others))
    if beams is not None and not 1 <= beams <= MOST_BEAMS:
        raise OptionError(f"--beams {beams} is outside 1 to {MOST_BEAMS}; give a number of them, 1 is no search")
    if beams is not None and beams > 1:
        asked |= {"use_beam_search": True, "beam_width": beams, "n": beams if n is None else n}
    elif length_penalty not in (None, 1.0):
        raise OptionError(f"--length_penalty {length_penalty} ranks beams; give --beams N from 2, or leave it out")
    return SamplingParams(**asked)


def guided(schema: str | None, regex: str | None, choice: list[str] | None) -> GuidedDecoding | None:
    """What the flags hold a text to; a schema is a file's, or what is given. Raises OptionError, SamplingError."""
    from penstock.grammar import GuidedDecoding

    if schema is None and regex is None and not choice:
        return None
    if schema is not None and not schema.lstrip().startswith("{"):
        try:
            schema = Path(schema).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise OptionError(f"--guided_json {schema[:60]!r} is no schema and no file of one: {error}") from None
    return GuidedDecoding(json=schema, regex=regex, choice=tuple(choice) if choice else None)


def seconds(flag: str, value: float | None) -> float | None:
    """Raises OptionError for what is no time."""
    if value is not None and not value > 0:  # so NaN is out
        raise OptionError(f"{flag} {value} is no number of seconds above 0; leave it out for no limit")
    return value


def numbered(texts: Sequence[CompletionOutput], tokenizer: Tokenizer | None) -> Iterator[str]:
    """A heading, the text, and what its tokens scored, for each."""
    for text in texts:
        yield f"[{text.index}]" if text.score is None else f"[{text.index}, score {text.score:.4f}]"
        yield text.text
        if rows := scores(text, tokenizer):
            yield rows


def scores(text: CompletionOutput, tokenizer: Tokenizer | None) -> str:
    """A line for each token: its log-probability, and the likeliest tokens with theirs; "" where nobody asked."""
    if text.logprobs is None:
        return ""
    rows: list[tuple[str, ...]] = [("token", "logprob", "likeliest")]
    for token, known in zip(text.token_ids, text.logprobs, strict=True):
        best = "  ".join(f"{_quoted(other, tokenizer)} {value:.3f}" for other, value in _best(known))
        rows.append((_quoted(token, tokenizer), f"{known[token]:.3f}".rjust(7), best))
    alone = all(len(known) == 1 for known in text.logprobs)  # the column would say the same again
    return table([row[:2] for row in rows] if alone else rows)


def facts(output: RequestOutput, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """For programs: the first text, and `outputs`: all. A search that was cut short may have none."""
    texts = [_text(text, tokenizer) for text in output.outputs]
    names = ("text", "token_ids", "finish_reason", "stop_reason")
    first = texts[0] if texts else dict.fromkeys(names)
    return {**{name: first[name] for name in names}, "outputs": texts}


def _text(text: CompletionOutput, tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {
        "index": text.index, "text": text.text, "token_ids": list(text.token_ids), "finish_reason": text.finish_reason,
        "stop_reason": text.stop_reason, "score": text.score, "cumulative_logprob": text.cumulative_logprob,
        "logprobs": None if text.logprobs is None else [
            {**_token(token, known[token], tokenizer), "likeliest": [_token(*each, tokenizer) for each in _best(known)]}
            for token, known in zip(text.token_ids, text.logprobs, strict=True)
        ],
    }  # fmt: skip


def _token(token: int, logprob: float, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """JSON has no infinity."""
    known = logprob if isfinite(logprob) else None
    return {"token_id": token, "token": _written(token, tokenizer), "logprob": known}


def _best(known: Mapping[int, float]) -> list[tuple[int, float]]:
    """The likeliest first; the token's own stands first in `known`, wherever it ranks."""
    return sorted(known.items(), key=lambda each: -each[1])


def _quoted(token: int, tokenizer: Tokenizer | None) -> str:
    return json.dumps(_written(token, tokenizer) or token, ensure_ascii=False)


def _written(token: int, tokenizer: Tokenizer | None) -> str | None:
    return tokenizer.decode([token], skip_special_tokens=False) if tokenizer else None
