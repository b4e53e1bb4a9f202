"""The one table of names that parse and are not built yet, and what to do instead. Building a thing deletes its row."""

from __future__ import annotations

from typing import Final, NoReturn

from penstock.errors import UnsupportedError

# Sampling parameters, arguments and functions by their name, verbs as "penstock VERB".
UNSUPPORTED: Final[dict[str, str]] = {
    # SamplingParams
    "n": "several completions of one prompt; send the prompt n times with different seeds",
    "best_of": "the best of several completions; send the prompt several times and choose",
    "use_beam_search": "beam search; use temperature=0 for the greedy text",
    "beam_width": "beam search; use temperature=0 for the greedy text",
    "length_penalty": "a parameter of beam search; leave it at 1.0",
    "early_stopping": "a parameter of beam search; leave it at False",
    "min_tokens": "a least number of tokens; use ignore_eos=True with max_tokens for a fixed number",
    "min_p": "the probability floor relative to the likeliest token; use top_p or top_k",
    "repetition_penalty": "a penalty on tokens already seen; leave it at 1.0",
    "presence_penalty": "a penalty on tokens already generated; leave it at 0.0",
    "frequency_penalty": "a penalty by how often a token was generated; leave it at 0.0",
    "no_repeat_ngram_size": "a ban on repeated n-grams; leave it at 0",
    "bad_words": "banned words; leave it empty",
    "logit_bias": "a bias per token id; leave it out",
    "logprobs": "log-probabilities of generated tokens; leave it out",
    "prompt_logprobs": "log-probabilities of prompt tokens; leave it out",
    "guided_decoding": "output held to a grammar; leave it out and check the text",
    "logits_processors": "callables that change logits; leave it empty",
    # LLM and build arguments
    "quantization": "quantised weights; use dtype 'bfloat16' or 'float16'",
    "quant_mode": "quantised weights; use dtype 'bfloat16' or 'float16'",
    "tensor_parallel_size": "more than one rank; use 1",
    "pipeline_parallel_size": "more than one pipeline stage; use 1",
    "tp_size": "running on more than one rank; use 1",
    "pp_size": "more than one pipeline stage; use 1",
    "lora_paths": "adapters; merge the adapter into the checkpoint first",
    "max_loras": "adapters; leave it out",
    "max_lora_rank": "adapters; leave it out",
    "lora_request": "adapters; leave it out for the base model",
    "lora_indices": "adapters; leave it out for the base model",
    "add_lora": "adapters; merge the adapter into the checkpoint first",
    "remove_lora": "adapters; there is none to remove",
    "speculative": "speculative decoding; leave it out, the text is the same",
    # Functions
    "compile": "compiling a hand-defined graph; write a family (docs/architecture.md) and build a checkpoint of it",
    # Verbs
    "penstock quantize": "quantising a checkpoint; build from the unquantised one",
    "penstock serve": "the HTTP server; use LLM.generate_async in Python",
    "penstock bench throughput": "requests of fixed lengths; `penstock bench latency --throughput` runs mixed ones",
    "penstock bench precision": "formats beside each other; run `penstock bench latency` with each --dtype",
    "penstock bench lora": "adapters; `penstock bench latency` measures the base model",
    "penstock bench serve": "the HTTP server; `penstock bench latency` measures without one",
    "penstock diff": "comparing two engines; compare the output of `penstock inspect` on both",
}

_NO_VALUE: Final = object()


def refuse(name: str, value: object = _NO_VALUE) -> NoReturn:
    """Raise the UnsupportedError of a row of the table, naming the value where one was given."""
    given = name if value is _NO_VALUE else f"{name}={value!r}"
    raise UnsupportedError(f"{given} is not built yet: {UNSUPPORTED[name]}")


def require_default(name: str, value: object, default: object) -> None:
    """Refuse `name` if it is in the table and was given another value than its default (its neutral one)."""
    if name in UNSUPPORTED and value != default:
        refuse(name, value)
