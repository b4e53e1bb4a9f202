"""Bits per byte and perplexity on the held-out text, out of the files as they are shipped (bfloat16 weights).

    python3 tools/train/evaluate.py penstock/bundled

Every passage is scored on its own: `<|bos|>` and then all its tokens, in windows of 1024 tokens that step by 512, so
that past the first window each token sees at least 512 tokens of context. Bits per byte is the sum of -log2 p over the
tokens, divided by the UTF-8 bytes of the text; perplexity is per token. Arithmetic is float32.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lora
import model as llama
import torch
from tokenizers import Tokenizer
from torch.nn import functional

ADAPTERS = ("scripture", "dictionary", "manual")
CONTEXT, STRIDE = 1024, 512


@dataclass(frozen=True)
class Passage:
    voice: str
    tokens: torch.Tensor
    num_bytes: int


@dataclass(frozen=True)
class Score:
    nats: float
    num_tokens: int
    num_bytes: int

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes)

    def report(self) -> dict[str, float]:
        bits = self.nats / math.log(2) / self.num_bytes
        perplexity = math.exp(self.nats / self.num_tokens)
        return {"bits_per_byte": round(bits, 4), "perplexity": round(perplexity, 3), "bytes": self.num_bytes}


def passages(tokenizer: Tokenizer, path: Path) -> list[Passage]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Passage(r["voice"], torch.tensor(tokenizer.encode(r["text"]).ids), len(r["text"].encode())) for r in records
    ]


@torch.no_grad()
def score(model: llama.Llama, passage: Passage) -> Score:
    """Each token but the first is counted once, in the window that gives it the most context."""
    device = next(model.parameters()).device
    tokens = passage.tokens.to(device)
    nats, done = 0.0, 1
    for start in range(0, len(tokens), STRIDE):
        window = tokens[start : start + CONTEXT]
        losses = functional.cross_entropy(model(window[None, :-1])[0].float(), window[1:], reduction="none")
        nats += losses[done - start - 1 :].double().sum().item()
        done = start + len(window)
        if done == len(tokens):
            break
    return Score(nats, len(tokens) - 1, passage.num_bytes)


def by_voice(model: llama.Llama, texts: list[Passage]) -> dict[str, Score]:
    scores: dict[str, Score] = {}
    for passage in texts:
        scores[passage.voice] = scores.get(passage.voice, Score(0.0, 0, 0)) + score(model.eval(), passage)
    return scores


def summary(scores: dict[str, Score]) -> dict[str, object]:
    total = sum(scores.values(), Score(0.0, 0, 0))
    return {**total.report(), "voices": {voice: s.report() for voice, s in scores.items()}}


def evaluate(folder: Path, device: torch.device) -> dict[str, object]:
    """Scores of target, draft and every adapter; `checks` says whether each promise holds."""
    tokenizer = Tokenizer.from_file(str(folder / "target/tokenizer.json"))
    texts = passages(tokenizer, folder / "heldout.jsonl")
    scores = {name: by_voice(llama.load(folder / name).to(device), texts) for name in ("target", "draft")}
    table = {"base": _perplexities(scores["target"])}
    for name in ADAPTERS:
        adapted = llama.load(folder / "target")
        lora.load(adapted, folder / "adapters" / name)
        table[name] = _perplexities(by_voice(adapted.to(device), texts))
    results: dict[str, object] = {name: summary(s) for name, s in scores.items()}
    sizes = {name: llama.load(folder / name).num_parameters() for name in scores}
    return {**results, "parameters": sizes, "adapter_perplexity": table, "checks": checks(scores, table)}


def _perplexities(scores: dict[str, Score]) -> dict[str, float]:
    return {voice: s.report()["perplexity"] for voice, s in scores.items()}


def checks(scores: dict[str, dict[str, Score]], table: dict[str, dict[str, float]]) -> dict[str, bool]:
    def bits(name: str) -> float:
        return sum(scores[name].values(), Score(0.0, 0, 0)).report()["bits_per_byte"]

    found = {"target <= 1.6 bits/byte": bits("target") <= 1.6, "draft <= 1.9 bits/byte": bits("draft") <= 1.9}
    for name in ADAPTERS:
        own = table[name][name]
        found[f"{name} lowers its voice by 10 %"] = own <= 0.9 * table["base"][name]
        found[f"{name} beats the other two there"] = all(own < table[o][name] for o in ADAPTERS if o != name)
    return found


@torch.no_grad()
def write(
    model: llama.Llama, tokenizer: Tokenizer, prompt: str, num_tokens: int, temperature: float = 0.7, seed: int = 0
) -> str:
    """Text after `prompt`, which may hold special tokens; for a look at the model, hence without a KV cache."""
    device = next(model.parameters()).device
    ids = tokenizer.encode(prompt).ids
    stops = {tokenizer.token_to_id(name) for name in ("<|eos|>", "<|end|>")}
    generator = torch.Generator().manual_seed(seed)
    start = len(ids)
    for _ in range(num_tokens):
        logits = model.eval()(torch.tensor([ids[-CONTEXT:]], device=device))[0, -1].float().cpu()
        token = _draw(logits, temperature, generator)
        if token in stops:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


PROMPTS = (
    "And it came to pass",
    "Genesis 51\n\n1 ",
    "oak, oak tree (noun):",
    "# Reading a file\n\n",
    "hacker (n)\n\n",
    "<|user|>Define mountain.<|end|><|assistant|>",
    "<|user|>Write a verse from Proverbs.<|end|><|assistant|>",
    "<|user|>What does the manual say about sorting?<|end|><|assistant|>",
)


def samples(folder: Path, device: torch.device, num_tokens: int = 60) -> list[tuple[str, str, str]]:
    """(model, prompt, text) for a look at what target and adapters write."""
    tokenizer = Tokenizer.from_file(str(folder / "target/tokenizer.json"))

    def sample(name: str, model: llama.Llama, prompts: tuple[str, ...]) -> list[tuple[str, str, str]]:
        model = model.to(device)
        return [(name, prompt, write(model, tokenizer, prompt, num_tokens)) for prompt in prompts]

    found = sample("target", llama.load(folder / "target"), PROMPTS)
    found += sample("draft", llama.load(folder / "draft"), PROMPTS[:3])
    for name in ADAPTERS:
        adapted = llama.load(folder / "target")
        lora.load(adapted, folder / "adapters" / name)
        found += sample(name, adapted, ("The king", "A tree is"))
    return found


def table(results: dict[str, object], put: Callable[[str], None] = print) -> None:
    for name in ("target", "draft"):
        report = results[name]
        assert isinstance(report, dict)
        voices = "  ".join(f"{v} {r['bits_per_byte']:.3f}" for v, r in report["voices"].items())
        put(f"{name:8} {report['bits_per_byte']:.4f} bits/byte   {voices}")
    perplexity = results["adapter_perplexity"]
    assert isinstance(perplexity, dict)
    columns = list(perplexity["base"])
    put(f"{'perplexity':12}" + "".join(f"{voice:>22}" for voice in columns))
    for name, row in perplexity.items():
        put(f"{name:12}" + "".join(f"{row[v]:12.3f} ({row[v] / perplexity['base'][v] - 1:+6.1%})" for v in columns))
    checked = results["checks"]
    assert isinstance(checked, dict)
    for name, holds in checked.items():
        put(f"{'yes' if holds else 'NO '}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", action="store_true")
    args = parser.parse_args()
    table(evaluate(args.folder, torch.device(args.device)))
    if args.samples:
        for name, prompt, text in samples(args.folder, torch.device(args.device)):
            print(f"--- {name}: {prompt!r}\n{text}")


if __name__ == "__main__":
    main()
