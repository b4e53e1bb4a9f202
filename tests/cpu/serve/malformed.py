"""Bodies that no endpoint may take: broken as JSON, wrong by the server's own document, or beyond what may be asked."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import jsonschema

GOOD: Final[dict[str, dict[str, Any]]] = {
    "/v1/completions": {"model": "bundled", "prompt": "Once", "max_tokens": 2},
    "/v1/chat/completions": {"model": "bundled", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
    "/tokenize": {"model": "bundled", "prompt": "Once"},
    "/detokenize": {"model": "bundled", "tokens": [1, 2, 3]},
}


class Case(NamedTuple):
    """`may_pass`: it is hostile rather than wrong, and 200 is an answer too."""

    path: str
    kind: str
    body: bytes
    may_pass: bool = False


def cases(document: Mapping[str, Any], count: int, seed: int = 0, hostile: bool = False) -> Iterator[Case]:
    """`document`: the server's own; of the same seed the same. `hostile`: some are, too, each as long as its limit."""
    rng = random.Random(seed)
    checks = {path: _check(document, path) for path in GOOD if path in document["paths"]}
    makers = (_broken, _wrong_by_schema, _asks_too_much)
    for _ in range(count):
        path = rng.choice([*checks])
        if hostile and "n" in OWN[path] and rng.random() < 0.005:
            yield _hostile(rng, path)
        else:
            yield rng.choice(makers)(rng, path, checks[path])


Check = jsonschema.Draft202012Validator


def _check(document: Mapping[str, Any], path: str) -> Check:
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return Check({**schema, "components": document["components"]})


def _fields(check: Check) -> list[str]:
    schema: Any = check.schema
    if "$ref" in schema:
        schema = schema["components"]["schemas"][schema["$ref"].split("/")[-1]]
    return [*schema["properties"]]


def _broken(rng: random.Random, path: str, check: Check) -> Case:
    kind = rng.choice([*BROKEN])
    return Case(path, kind, BROKEN[kind](rng, json.dumps(GOOD[path]).encode()))


def _at(rng: random.Random, good: bytes, piece: bytes) -> bytes:
    place = rng.randrange(len(good))
    return good[:place] + piece + good[place:]


def _first(good: bytes, key: bytes, value: bytes) -> bytes:
    return b'{"' + key + b'": ' + value + b", " + good[1:]


DEEP: Final = (300, 5000, 200_000)
MANY: Final = (5, 30_000)
DIGITS: Final = (b"9" * 5000, b"1e999", b"-1e400", b"9" * 40)
BROKEN: Final[dict[str, Callable[[random.Random, bytes], bytes]]] = {
    "truncated": lambda rng, good: good[: rng.randrange(len(good))],
    "no UTF-8": lambda rng, good: _at(rng, good, rng.choice([b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf8\x88"])),
    "control": lambda rng, good: _at(rng, good, rng.choice([b"\x00", b"\x01", b"\x1f"])),
    "trailing": lambda rng, good: good + rng.choice([b"}", b"{}", b"x", b"\x00", good]),
    "no object": lambda rng, good: rng.choice([b"[]", b"1", b"null", b"true", b'"x"', b"[" + good + b"]"]),
    "deep": lambda rng, good: _first(good, b"user", b"[" * (n := rng.choice(DEEP)) + b"]" * n),
    "deep objects": lambda rng, good: _first(good, b"user", b'{"a":' * (n := rng.choice(DEEP)) + b"1" + b"}" * n),
    "unclosed": lambda rng, good: good[:-1] + b', "user": ' + b"[" * rng.choice([1, 10, 100_000]),
    "no number": lambda rng, good: _first(good, b"seed", rng.choice([b"NaN", b"-Infinity", b"0x1", b"01"])),
    "huge number": lambda rng, good: _first(good, b"max_tokens", rng.choice(DIGITS)),
    "twice": lambda rng, good: _first(good, b"model", b'"bundled"'),
    "unknown": lambda rng, good: _first(good, rng.choice([b"colour", b"__class__", b"x" * 50_000, b"model "]), b"1"),
    "many unknown": lambda rng, good: good[:-1] + b"".join(b', "k%d": 1' % i for i in range(rng.choice(MANY))) + b"}",
    "many objects": lambda rng, good: _first(good, b"user", b"[" + b"{}," * rng.choice([100, 300_000]) + b"{}]"),
    "half a character": lambda rng, good: _first(good, b"user", b'"\\ud800"'),
    "empty": lambda rng, good: b" " * rng.choice([0, 1, 100_000]),
}  # fmt: skip

VALUES: Final[tuple[Any, ...]] = (
    None, True, -1, 0.5, 1e308, -(2**63), 10**30, "", "x", "x" * 5000, [], [[]], [None], {}, {"a": {"b": 1}},
    [{}] * 100, ["x"] * 5000, [1, "x"], [[1], "x"], {str(i): i for i in range(5000)}, [[[[[]]]]], [True], [0.5], "null",
    {"": None},
)  # fmt: skip


def _wrong_by_schema(rng: random.Random, path: str, check: Check) -> Case:
    """A field with a value that the document does not allow there."""
    while True:
        field, value = rng.choice(_fields(check)), rng.choice(VALUES)
        if not check.is_valid(GOOD[path] | {field: value}):
            return Case(path, f"wrong {field}", json.dumps(GOOD[path] | {field: value}).encode())


SAMPLING: Final[dict[str, tuple[Any, ...]]] = {
    "n": (0, -1, 1000, 10**9), "best_of": (1000, 10**6), "temperature": (-1, -0.001), "top_p": (-0.1, 1.1),
    "min_p": (-1, 2), "repetition_penalty": (-1,), "max_tokens": (-1, 2**31, 2**70),
    "min_tokens": (-1, 10**9), "stop": (["x"] * 1000, [""], [1], ["x" * 100_000]), "bad_words": ([""], ["x"] * 10_000),
    "logit_bias": ({str(i): 1 for i in range(5000)}, {"a": 1}, {"-1": 1}, {"99999999": 1}, {"1": "x"}),
    "stop_token_ids": ([-1], list(range(100_000)), [2**70]), "priority": (2**31, 2**70), "timeout": (0, -1, 1e300),
    "stream_options": ({"include_usage": True}, {"other": 1}), "cache_salt": ("", "x" * 100_000), "model": ("other",),
    "response_format": ({"type": "xml"}, {"type": "json_schema"}, {"type": "json_object", "json_schema": {"name": 1}}),
    "guided_choice": ([], {}, [1]), "guided_regex": ("(", "[", "a{2,1}", "(?P<x", "\\"),
    "guided_grammar": ("root ::=", "", "x ::= y"), "guided_json": ({"type": "nothing"}, "{", {"$ref": "#/none"}),
    "prompt_logprobs": (-1, 10**6),
}  # fmt: skip
OWN: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "/v1/completions": SAMPLING | {
        "prompt": ([], [[]], [-1], [2**40], [1.5], [["a"]], [1, "a"], "a" * 2_000_000, [1] * 100_000, [["x"]],
                   ["a"] * 10_000, [[1]] * 10_000, None),
        "logprobs": (-1, 10**6), "suffix": ("x",),
    },
    "/v1/chat/completions": SAMPLING | {
        "messages": (
            [], [1], [{"role": "user"}], [{"role": "root", "content": "x"}], [{"content": "x"}],
            [{"role": "user", "content": {"a": 1}}], [{"role": "tool", "content": "x"}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost/"}}]}],
            [{"role": "user", "content": "x"}] * 20_000, [{"role": "user", "content": "x" * 1_000_000}],
            [{"role": "user", "content": "x", "extra": 1}], [{"role": "assistant", "tool_calls": [{"id": 1}]}],
        ),
        "top_logprobs": (-1, 10**6), "max_completion_tokens": (0, -1, 2**40), "chat_template": ("{{ 1 }}", "{% for"),
        "chat_template_kwargs": ({"messages": []}, {f"k{i}": 1 for i in range(5000)}), "tools": ([1], [{}], {}),
        "tool_choice": ("always", {"type": "function"}, 1), "service_tier": ("x",),
    },
    "/tokenize": {"prompt": (None, 1, ["a"], [1]), "model": ("other", 1)},
    "/detokenize": {"tokens": ([-1], [2**40], [2**70], ["a"], [[1]], None, [10**6]), "model": ("other",)},
}  # fmt: skip
# Each may be served or refused, but in bounded time.
HOSTILE: Final[dict[str, tuple[Any, ...]]] = {
    "guided_regex": ("(a+)+" * 50, "a{1,1000000}", "(a|aa)*" * 200, "(" * 500 + "a" + ")" * 500, "[^\\x00]{9999}"),
    "guided_json": ({"enum": list(range(5000))}, {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
                    {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}),
    "guided_grammar": ("root ::= root", "root ::= " + "(" * 500 + '"a"' + ")" * 500),
    "guided_choice": ([f"choice {i}" for i in range(10_000)],),
}  # fmt: skip


def _asks_too_much(rng: random.Random, path: str, check: Check) -> Case:
    """What is wrong in itself, whatever the document can express."""
    field = rng.choice([*OWN[path]])
    return Case(path, f"bad {field}", json.dumps(GOOD[path] | {field: rng.choice(OWN[path][field])}).encode())


def _hostile(rng: random.Random, path: str) -> Case:
    field = rng.choice([*HOSTILE])
    return Case(path, f"hostile {field}", json.dumps(GOOD[path] | {field: rng.choice(HOSTILE[field])}).encode(), True)
