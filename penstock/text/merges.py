"""Merges out of a vocabulary alone: any two neighbours whose joint text is a token may merge, the best token first.

That is how SentencePiece's BPE and tiktoken work; a list of merges is how the tokenizer library wants to be told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penstock.errors import TokenizerError

MAX_WORK = 1 << 28  # squares of the tokens' lengths, which is what cutting them costs; the published take a tenth


def all_merges(tokens: Sequence[str], rank: Callable[[str], float]) -> list[tuple[str, str]]:
    """Every split of every token into two others, by the token's rank (low merges first).

    `tokens` come in the order of their ids: splits of one token go by the ids of their parts, which makes the leftmost
    of several that overlap the first one, since shorter tokens have the smaller ids. Raises TokenizerError where the
    tokens are so many and long that this would take minutes.
    """
    if (work := sum(len(token) ** 2 for token in tokens)) > MAX_WORK:
        raise TokenizerError(
            f"{len(tokens)} tokens of up to {max(map(len, tokens))} characters are too long to find their merges "
            f"({work} pairs of characters, at most {MAX_WORK}); is the file damaged? If not, use a tokenizer.json"
        )
    ids = {token: index for index, token in enumerate(tokens)}
    found: list[tuple[float, int, int, str, str]] = []
    for token in tokens:
        own = rank(token)
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((own, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
