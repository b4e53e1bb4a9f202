"""Log-probabilities and counts as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from penstock.serve.texts import Scored
from penstock.text.spelling import Spelling

_LEAST: Final = -9999.0  # JSON has no infinity


@dataclass
class Usage:
    """Tokens of one request."""

    prompt: int
    completion: int = 0
    cached: int = 0

    def json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def completion_logprobs(scored: Sequence[Scored], spelling: Spelling, top: int, behind: int = 0) -> dict[str, Any]:
    """A row a token; `top` likeliest and the token itself. `behind`: characters of text that come before."""
    return {
        "tokens": [spelling.of(each.token)[0] for each in scored],
        "token_logprobs": [_own(each) for each in scored],
        "top_logprobs": [_by_text(each, spelling, top) for each in scored],
        "text_offset": [each.offset + behind for each in scored],
    }


def chat_logprobs(scored: Iterable[Scored], spelling: Spelling, top: int) -> dict[str, Any]:
    """Of each token, with `top` likeliest."""
    return {"content": [_token(each, spelling, top) for each in scored], "refusal": None}


def prompt_logprobs(found: Iterable[Mapping[int, float] | None], spelling: Spelling, top: int) -> list[Any]:
    """As vLLM's: of each token of the prompt, itself and the `top` likeliest by token id."""
    return [scores and _by_id(scores, spelling, top) for scores in found]


def _by_id(scores: Mapping[int, float], spelling: Spelling, top: int) -> dict[str, Any]:
    kept = dict([next(iter(scores.items())), *_likeliest(scores, top)])
    return {str(i): {"logprob": max(p, _LEAST), "decoded_token": spelling.of(i)[0]} for i, p in kept.items()}


def _own(scored: Scored) -> float | None:
    return max(scored.scores[scored.token], _LEAST) if scored.scores else None


def _likeliest(scores: Mapping[int, float], top: int) -> list[tuple[int, float]]:
    return sorted(scores.items(), key=lambda each: -each[1])[:top]


def _by_text(scored: Scored, spelling: Spelling, top: int) -> dict[str, float] | None:
    if not scored.scores:
        return None
    found: dict[str, float] = {}
    for token, value in [*_likeliest(scored.scores, top), (scored.token, scored.scores[scored.token])]:
        found.setdefault(spelling.of(token)[0], max(value, _LEAST))
    return found


def _token(scored: Scored, spelling: Spelling, top: int) -> dict[str, Any]:
    own = _spelt(scored.token, scored.scores[scored.token], spelling)
    own["top_logprobs"] = [_spelt(*each, spelling) for each in _likeliest(scored.scores, top)]
    return own


def _spelt(token: int, value: float, spelling: Spelling) -> dict[str, Any]:
    text, spelt = spelling.of(token)
    return {"token": text, "logprob": max(value, _LEAST), "bytes": list(spelt)}
