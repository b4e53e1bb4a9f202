"""Trains the bundled model from the corpus, in one command: tokenizer, target, draft, adapters, evaluation, one tar.

    python3 tools/train/run.py --corpus .corpus --out OUT --minutes 8

writes OUT/bundled.tar, OUT/results.json and OUT/samples.txt. Unpack with `tar -xf OUT/bundled.tar -C penstock/bundled`.

A larger teacher is trained first and thrown away: on a text this short, learning from its distribution beside the text
keeps a small model from learning by heart (Hinton et al. 2015). The draft learns from the target in the same way, which
also makes it guess the target's words.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import tarfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import data
import evaluate
import lora
import model as llama
import tokenizer as bpe
import torch
from model import Config, Llama
from tokenizers import Tokenizer
from train import Dev, Fit, Schedule, fit

TARGET = Config(256, 6, 4, 2, 512)
DRAFT = Config(128, 3, 2, 1, 352)
TEACHER = Config(512, 8, 8, 4, 1408)

# Shares of the total time; the rest is for reading, compiling and measuring.
TIME = {"teacher": 0.2, "target": 0.36, "draft": 0.14, "adapter": 0.07}


@dataclass
class Job:
    """What every stage needs."""

    args: argparse.Namespace
    corpus: data.Corpus
    tokenizer: Tokenizer
    device: torch.device
    folder: Path
    fits: dict[str, dict[str, object]]

    def dev(self, voices: tuple[str, ...]) -> Dev:
        records = [r for voice in voices for r in self.corpus.dev[voice]]
        tokens = data.stream(self.tokenizer, records, 0.0, self.args.seed)
        return Dev(tokens, sum(len(r["text"].encode()) for r in records))

    def schedule(self, stage: str, epochs: float, lr: float, weight_decay: float, distil: float = 0.0) -> Schedule:
        """Compiling takes half a minute, so the short trainings go without."""
        a = self.args
        return Schedule(
            minutes=a.minutes * TIME[stage],
            epochs=epochs,
            lr=lr,
            weight_decay=weight_decay,
            batch=a.batch,
            length=a.length,
            distil=distil,
            num_evals=a.evals,
            compile=a.compile and stage in ("teacher", "target"),
            seed=a.seed,
        )

    def note(self, name: str, schedule: Schedule, done: Fit) -> None:
        self.fits[name] = {"schedule": asdict(schedule), "fit": asdict(done)}
        print(
            f"{name}: {done.steps} steps, {done.epochs:.1f} epochs, {done.seconds:.0f} s, dev {done.best:.4f}",
            flush=True,
        )


def main() -> None:
    args = _arguments()
    begin = time.monotonic()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundled"
        corpus = data.load(args.corpus)
        device = torch.device(args.device)
        job = Job(args, corpus, _train_tokenizer(corpus, args), device, folder, {})
        target, draft = _models(job)
        _adapters(job)
        shutil.copy(args.corpus / "heldout.jsonl", folder / "heldout.jsonl")
        torch.set_float32_matmul_precision("highest")
        results = evaluate.evaluate(folder, device)
        sizes = {"target": target.num_parameters(), "draft": draft.num_parameters()}
        assert results["parameters"] == sizes
        _finish(job, results, begin)


def _train_tokenizer(corpus: data.Corpus, args: argparse.Namespace) -> Tokenizer:
    texts = [r["text"] for r in corpus.base(args.share)]
    random.Random(args.seed).shuffle(texts)
    return bpe.train(texts, TARGET.vocab_size)


def _models(job: Job) -> tuple[Llama, Llama]:
    a = job.args
    tokens = data.stream(job.tokenizer, job.corpus.base(a.share), a.chat, a.seed)
    print(f"{len(tokens)} tokens in the base text", flush=True)
    teacher = None
    if a.teacher:
        teacher = _base(job, "teacher", TEACHER, tokens, a.teacher_dropout, None, a.teacher_epochs, a.teacher_lr, 0.2)
    target = _base(job, "target", TARGET, tokens, a.dropout, teacher, a.epochs, a.lr, 0.1)
    draft = _base(job, "draft", DRAFT, tokens, 0.0, target, a.draft_epochs, a.draft_lr, 0.05)
    return target, draft


def _base(
    job: Job,
    name: str,
    config: Config,
    tokens: torch.Tensor,
    dropout: float,
    teacher: Llama | None,
    epochs: float,
    lr: float,
    decay: float,
) -> Llama:
    model = Llama(config, dropout).to(job.device)
    distil = job.args.distil if teacher is not None else 0.0
    schedule = job.schedule(name, epochs=epochs, lr=lr, weight_decay=decay, distil=distil)
    print(f"{name}: {model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    done = fit(model, list(model.parameters()), tokens, job.dev(data.VOICES), schedule, teacher, _say)
    job.note(name, schedule, done)
    if name != "teacher":
        specials = {key: bpe.token_id(job.tokenizer, f"<|{key}|>") for key in ("bos", "eos", "end")}
        llama.save(model, job.folder / name, specials)
        bpe.save(job.tokenizer, job.folder / name, config.max_position_embeddings)
    return model


def _adapters(job: Job) -> None:
    """Each learns from all of its voice: the base's share once more, and what the base has never read."""
    a = job.args
    for voice in evaluate.ADAPTERS:
        adapted = _with_dropout(llama.load(job.folder / "target"), a.adapter_dropout).to(job.device)
        parameters = lora.attach(adapted, a.rank, 2 * a.rank, a.adapter_dropout)
        tokens = data.stream(job.tokenizer, job.corpus.train[voice], 0.0, a.seed)
        schedule = job.schedule("adapter", epochs=a.adapter_epochs, lr=a.adapter_lr, weight_decay=0.05)
        done = fit(adapted, parameters, tokens, job.dev((voice,)), schedule, None, _say)
        job.note(f"adapter {voice}", schedule, done)
        lora.save(adapted, job.folder / "adapters" / voice, a.rank, 2 * a.rank, "penstock/bundled/target")


def _with_dropout(model: Llama, dropout: float) -> Llama:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model


def _finish(job: Job, results: dict[str, object], begin: float) -> None:
    a = job.args
    a.out.mkdir(parents=True, exist_ok=True)
    results["training"] = job.fits
    results["settings"] = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items() if k not in ("corpus", "out")
    }
    results["environment"] = _environment(job.device)
    results["seconds"] = round(time.monotonic() - begin, 1)
    text = json.dumps(results, indent=2) + "\n"
    for path in (job.folder / "results.json", a.out / "results.json"):
        path.write_text(text, encoding="utf-8")
    with tarfile.open(a.out / "bundled.tar", "w") as archive:
        archive.add(job.folder, ".", filter=_anonymous)
    shown = evaluate.samples(job.folder, job.device)
    lines = [f"--- {name}: {prompt!r}\n{sample}\n" for name, prompt, sample in shown]
    (a.out / "samples.txt").write_text("".join(lines), encoding="utf-8")
    print("".join(lines))
    evaluate.table(results)
    print(f"{(a.out / 'bundled.tar').stat().st_size / 1e6:.2f} MB, {time.monotonic() - begin:.0f} s in all")


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    member.mode = 0o755 if member.isdir() else 0o644
    return member


def _environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def _say(line: str) -> None:
    print(line, flush=True)


def _share(text: str) -> dict[str, float]:
    """`scripture=0.5,manual=0.4` over the defaults."""
    shares = {"scripture": 0.35, "dictionary": 0.35, "manual": 0.35, "jargon": 1.0}
    for pair in filter(None, text.split(",")):
        voice, _, value = pair.partition("=")
        if voice not in shares or not 0 < float(value) <= 1:
            raise argparse.ArgumentTypeError(f"{pair!r}: expected one of {sorted(shares)}=<share in (0, 1]>")
        shares[voice] = float(value)
    return shares


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--corpus", type=Path, required=True)
    add("--out", type=Path, required=True)
    add("--minutes", type=float, default=8.0, help="wall time of the trainings together")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--share", type=_share, default="", help="how much of each voice the base reads, as scripture=0.5,manual=0.4")
    add("--chat", type=float, default=0.06, help="share of chat samples in the base's tokens")
    add("--batch", type=int, default=32)
    add("--length", type=int, default=1024)
    add("--seed", type=int, default=1611)
    add("--evals", type=int, default=12, help="how often a training looks at its dev text")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    add("--teacher", action=argparse.BooleanOptionalAction, default=True)
    add("--teacher-epochs", type=float, default=30)
    add("--teacher-dropout", type=float, default=0.3)
    add("--teacher-lr", type=float, default=1e-3)
    add("--distil", type=float, default=0.7, help="weight of the teacher's distribution in the loss")
    add("--epochs", type=float, default=80)
    add("--dropout", type=float, default=0.05)
    add("--lr", type=float, default=3e-3)
    add("--draft-epochs", type=float, default=60)
    add("--draft-lr", type=float, default=5e-3)
    add("--rank", type=int, default=16)
    add("--adapter-epochs", type=float, default=15)
    add("--adapter-lr", type=float, default=2e-3)
    add("--adapter-dropout", type=float, default=0.1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
