"""One training loop for every model here: bf16 autocast, AdamW, warm-up and cosine, bounded by time and by epochs.

The corpus is small and is read many times, so three things guard against learning it by heart: dropout, weight decay,
and a dev text on which the kept weights are chosen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from data import Batches
from model import Llama
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Schedule:
    """`minutes` limits wall time, `epochs` the passes over the text: whichever comes first ends the cosine."""

    minutes: float
    epochs: float
    lr: float
    weight_decay: float = 0.1
    batch: int = 32
    length: int = 1024
    warmup: float = 0.03
    distil: float = 0.0
    """Weight of KL(teacher || student); the rest is the cross entropy of the text."""
    num_evals: int = 12
    compile: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Dev:
    """A dev text: int64[N] tokens, and the UTF-8 bytes they stand for."""

    tokens: torch.Tensor
    num_bytes: int


@dataclass
class Fit:
    """What one run did; `curve` holds (progress, training loss in nats per token, dev bits per byte)."""

    seconds: float
    steps: int
    epochs: float
    best: float
    curve: list[tuple[float, float, float]]


class Objective(nn.Module):
    """Mean loss of a batch int64[B, T + 1]; with teacher logits [B, T, V], mixed with the divergence from them."""

    def __init__(self, model: Llama, distil: float) -> None:
        super().__init__()
        self.model = model
        self.distil = distil

    def forward(self, batch: torch.Tensor, teacher: torch.Tensor | None) -> torch.Tensor:
        logits = self.model(batch[:, :-1]).float().flatten(0, 1)
        loss = functional.cross_entropy(logits, batch[:, 1:].flatten())
        if teacher is None:
            return loss
        target = teacher.float().flatten(0, 1).log_softmax(-1)
        divergence = functional.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="batchmean")
        return (1 - self.distil) * loss + self.distil * divergence


def fit(
    model: Llama,
    parameters: Sequence[nn.Parameter],
    tokens: torch.Tensor,
    dev: Dev,
    schedule: Schedule,
    teacher: Llama | None = None,
    say: Callable[[str], None] = print,
) -> Fit:
    """Trains `parameters` of `model` in place and leaves in it the weights that were best on `dev`."""
    trainer = _Trainer(model, parameters, tokens, dev, schedule, teacher, say)
    return trainer.run()


class _Trainer:
    def __init__(
        self,
        model: Llama,
        parameters: Sequence[nn.Parameter],
        tokens: torch.Tensor,
        dev: Dev,
        schedule: Schedule,
        teacher: Llama | None,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.parameters, self.dev, self.s, self.say = model, list(parameters), dev, schedule, say
        self.device = self.parameters[0].device
        self.teacher = teacher.eval().requires_grad_(False) if teacher is not None else None
        self.batches = iter(Batches(tokens, schedule.batch, schedule.length, self.device, schedule.seed))
        self.optimizer = self._adamw()
        # The last incomplete batch of an epoch is skipped, hence the floor.
        self.steps_per_epoch = max(1, len(tokens) // (schedule.length * schedule.batch))
        self.state: list[torch.Tensor] = []
        self.result = Fit(0.0, 0, 0.0, math.inf, [])

    def _adamw(self) -> torch.optim.AdamW:
        matrices = [p for p in self.parameters if p.dim() > 1]
        vectors = [p for p in self.parameters if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": self.s.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        fused = self.device.type == "cuda"
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=self.s.lr, betas=(0.9, 0.98), fused=fused)

    def run(self) -> Fit:
        begin = time.monotonic()
        end = begin + 60 * self.s.minutes
        objective = self._objective()
        # Compiling spends the budget but not the schedule: the cosine spans what is left.
        start = time.monotonic()
        progress, evals, step, loss = 0.0, 0, 0, torch.zeros(())
        while progress < 1:
            self._set_rate(progress)
            loss = self._step(objective)
            step += 1
            if step % 10 == 0 or self.device.type == "cpu":
                loss.item()  # waits for the device, so that the clock below means work done
            clock = (time.monotonic() - start) / max(end - start, 1e-3)
            progress = max(clock, step / (self.s.epochs * self.steps_per_epoch))
            if progress * self.s.num_evals >= evals + 1:
                evals = int(progress * self.s.num_evals)
                self._evaluate(progress, step, loss.item())
        self._restore()
        self.result.seconds = time.monotonic() - begin
        self.result.steps, self.result.epochs = step, step / self.steps_per_epoch
        return self.result

    def _objective(self) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
        """The compiled objective, tried forward and backward once; the plain one where compiling is not possible."""
        plain = Objective(self.model, self.s.distil)
        if not self.s.compile or self.device.type == "cpu":
            return plain
        try:
            torch._dynamo.reset()
            compiled = torch.compile(plain)
            with self._autocast():
                compiled(*self._inputs()).backward()
            self.optimizer.zero_grad(set_to_none=True)
        except Exception as error:
            self.say(f"  not compiled: {type(error).__name__}")
            return plain
        return compiled

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _inputs(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch = next(self.batches)
        if self.teacher is None:
            return batch, None
        with torch.no_grad(), self._autocast():
            return batch, self.teacher(batch[:, :-1])

    def _step(self, objective: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]) -> torch.Tensor:
        with self._autocast():
            loss = objective(*self._inputs())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _set_rate(self, progress: float) -> None:
        warm = min(1.0, (progress + 1e-3) / self.s.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.s.lr * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def _evaluate(self, progress: float, step: int, loss: float) -> None:
        bits = dev_bits_per_byte(self.model, self.dev, self.s.length, self._autocast())
        self.result.curve.append((round(progress, 4), round(loss, 4), round(bits, 4)))
        epoch = step / self.steps_per_epoch
        self.say(f"  {progress:5.0%}  epoch {epoch:6.1f}  loss {loss:.3f}  dev {bits:.4f} bits/byte")
        if bits < self.result.best:
            self.result.best = bits
            self.state = [p.detach().clone() for p in self.parameters]

    def _restore(self) -> None:
        with torch.no_grad():
            for parameter, best in zip(self.parameters, self.state, strict=False):
                parameter.copy_(best)


@torch.no_grad()
def dev_bits_per_byte(model: Llama, dev: Dev, length: int, autocast: torch.autocast) -> float:
    """Quick measure in windows without overlap; evaluate.py holds the one that is reported."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    nats = 0.0
    for start in range(0, len(dev.tokens) - 1, length):
        window = dev.tokens[start : start + length + 1].to(device)[None]
        with autocast:
            logits = model(window[:, :-1])
        nats += functional.cross_entropy(logits[0].float(), window[0, 1:], reduction="sum").item()
    model.train(training)
    return nats / math.log(2) / dev.num_bytes
