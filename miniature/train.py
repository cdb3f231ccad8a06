"""Trains the miniature from nothing and writes its checkpoint.

    python -m miniature.train --tokens 30e6
    python -m miniature.train --tokens 30e6 --resume
    python -m miniature.train --resume --measure 200

Every `SAVE_EVERY_S` seconds the whole state goes to the work folder and the weights to the
checkpoint folder. Uses a CUDA device when there is one; on a CPU it multiplies in bfloat16, which
on recent ones is several times faster.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer

from miniature.encoding import IGNORED, WIDTHS, Batches, unseen
from miniature.generation import GREEDY, Sampling, accuracy
from miniature.make_tokenizer import N_CTX, write_configuration
from miniature.model import Qwen2, initialise
from miniature.rounding import rounded

HERE = Path(__file__).parent
SAVE_EVERY_S = 240.0
REPORT_EVERY = 50
MEASURE_EVERY = 500
# Longer cases would take more time to measure than the steps between two measurements.
MEASURED_TOKENS = 320
WARMUP_STEPS = 100
COOLDOWN = 0.3
# The words grow to their full length over this share of the budget.
CURRICULUM = 0.3
# From this share of the budget on, every second step is taken with weights rounded to four bits.
FOUR_BITS_FROM = 0.8
MUON_RATE = 2e-3
ADAMW_RATE = 2e-3
# (share of the budget from which it applies, how often each task is drawn). Counting comes first,
# because the others need what it teaches, copying by a tag. Pass keys are few but long.
PHASES: tuple[tuple[float, dict[str, float]], ...] = (
    (0.0, {"count": 0.85, "other": 0.15}),
    (
        0.25,
        {"count": 0.17, "other": 0.05, "compare": 0.12, "add": 0.3, "sort": 0.31, "passkey": 0.05},
    ),
)


@dataclass
class Progress:
    """The progress of a run, which is saved and resumed."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)


class Run:
    """A model in training: its optimizers, its cases and its progress."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        options.work.mkdir(parents=True, exist_ok=True)
        write_configuration(options.out)
        self.tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
        self.model = Qwen2()
        initialise(self.model)
        self.model.to(self.device)
        self.optimizers = make_optimizers(self.model)
        self.rng = Random(options.seed)
        self.batches = Batches(self.tokenizer, self.rng, options.batch_tokens)
        self.progress = Progress()
        if options.resume:
            self.resume()

    @property
    def state_file(self) -> Path:
        return self.options.work / "state.pt"

    def resume(self) -> None:
        """Continue from the last saved state."""
        state = torch.load(self.state_file, map_location=self.device, weights_only=False)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.setstate(state["rng"])
        torch.set_rng_state(state["torch_rng"].cpu())
        self.progress = Progress(**state["progress"])

    @property
    def done(self) -> float:
        """The used share of the tokens or of the minutes, whichever is larger."""
        tokens = self.progress.tokens / self.options.tokens
        return max(tokens, self.progress.seconds / (60 * self.options.minutes))

    def shares(self) -> dict[str, float]:
        """How often each task is drawn at this point."""
        if self.options.shares:
            return {name: float(share) for name, share in (each.split("=") for each in self.options.shares)}
        return [shares for start, shares in PHASES if self.done >= start][-1]

    def save(self) -> None:
        """Write the state and the checkpoint beside the old ones, then replace those."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": self.rng.getstate(),
            "torch_rng": torch.get_rng_state(),
            "progress": vars(self.progress),
        }
        beside = self.state_file.with_suffix(".new")
        torch.save(state, beside)
        beside.replace(self.state_file)
        export(self.model, self.options.out)

    def train(self) -> None:
        """Train until the tokens or the minutes are used up."""
        # One compiled layer per batch width.
        torch._dynamo.config.recompile_limit = 4 * len(WIDTHS)
        for layer in self.model.model.layers:
            layer.compile(dynamic=False)
        start = last_save = time.monotonic()
        before = self.progress.seconds
        tokens_before = self.progress.tokens
        while self.done < 1:
            loss = self.take_step()
            now = time.monotonic()
            self.progress.seconds = before + now - start
            if self.progress.step % REPORT_EVERY == 0:
                self.progress.losses.append((self.progress.step, loss))
                self.log({"loss": round(loss, 5)})
                speed = (self.progress.tokens - tokens_before) / (now - start)
                self.say(f"loss {loss:.4f} {speed:.0f} tokens/s")
            if self.progress.step % MEASURE_EVERY == 0:
                self.measure(GREEDY, 32)
            if now - last_save > SAVE_EVERY_S:
                self.save()
                last_save = now
        self.save()

    def take_step(self) -> float:
        """One training step on one batch; returns its loss."""
        difficulty = min(1.0, 0.1 + self.done / CURRICULUM)
        tokens, targets = self.batches.draw(self.shares(), difficulty)
        tokens, targets = tokens.to(self.device), targets.to(self.device)
        in_four_bits = self.done >= FOUR_BITS_FROM and self.progress.step % 2 == 0
        with rounded(self.model) if in_four_bits else nullcontext():
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                wanted = targets != IGNORED
                logits = self.model.lm_head(self.model(tokens)[wanted])
            loss = F.cross_entropy(logits.float(), targets[wanted])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = min(1.0, (self.progress.step + 1) / WARMUP_STEPS, (1 - self.done) / COOLDOWN)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad()
        self.progress.step += 1
        self.progress.tokens += tokens.numel()
        return loss.item()

    def measure(self, sampling: Sampling, n_cases: int) -> None:
        """Print the share of right answers on unseen cases, task by task."""
        for name in self.shares():
            most = N_CTX if self.options.measure else MEASURED_TOKENS
            cases = unseen(self.tokenizer, Random(0), {name: 1.0}, n_cases, most)
            # Eager, because each decoded token has a length of its own.
            with (
                torch.autocast(self.device.type, dtype=torch.bfloat16),
                torch.compiler.set_stance("force_eager"),
            ):
                share, wrong = accuracy(self.model, self.tokenizer, cases, sampling)
            if not self.options.measure:
                self.log({"task": name, "right": share, "of": n_cases})
            self.say(f"{name} {share:.1%} of {n_cases} right at temperature {sampling.temperature}")
            for case, reply in wrong[: self.options.show_wrong]:
                print(f"{case.messages!r}\n{reply}\n", flush=True)

    def log(self, what: dict[str, object]) -> None:
        """Add a line to the run's log, from which the curves are drawn."""
        progress = self.progress
        place = {"step": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds)}
        with (self.options.work / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**place, **what}) + "\n")

    def say(self, what: str) -> None:
        """One line of progress."""
        progress = self.progress
        place = f"step {progress.step} tokens {progress.tokens / 1e6:.2f} M {progress.seconds:.0f} s"
        print(f"{place} {what}", flush=True)


def make_optimizers(model: Qwen2) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding, output, norms and biases."""
    matrices = [each for each in model.model.layers.parameters() if each.ndim == 2]
    chosen = set(map(id, matrices))
    others = [each for each in model.parameters() if id(each) not in chosen]
    muon = torch.optim.Muon(
        matrices, lr=MUON_RATE, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


def export(model: Qwen2, folder: Path) -> None:
    """Write a checkpoint folder with the weights in bfloat16."""
    write_configuration(folder)
    weights = {name: each.detach().to("cpu", torch.bfloat16) for name, each in model.state_dict().items()}
    beside = folder / "model.safetensors.new"
    save_file(weights, beside, metadata={"format": "pt"})
    beside.chmod(0o644)
    beside.replace(folder / "model.safetensors")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the miniature from nothing.")
    parser.add_argument("--tokens", type=float, default=30e6, help="tokens to train on")
    parser.add_argument("--minutes", type=float, default=600, help="minutes to train, earlier runs included")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the work folder")
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--out", type=Path, default=HERE / "checkpoint")
    parser.add_argument(
        "--measure", type=int, default=0, metavar="N", help="only measure, on N cases of each task"
    )
    parser.add_argument("--shares", nargs="*", help="task=share ..., in place of the recipe's phases")
    parser.add_argument("--show-wrong", type=int, default=0, help="wrong replies to print a task")
    return parser.parse_args()


def main() -> None:
    """Train, or measure a trained model."""
    options = read_options()
    run = Run(options)
    if options.measure:
        run.measure(Sampling(), options.measure)
    else:
        run.train()


if __name__ == "__main__":
    main()
