"""Draws the two pictures of the README: the training, and the loss past the window.

    python -m miniature.curves

Reads what `miniature.train` logged and what `miniature.evaluate` measured, both in the work folder, and
writes training.png and window.png beside this file. Needs matplotlib, of the `train` extra.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

from miniature.make_tokenizer import N_CTX

HERE = Path(__file__).parent
SMOOTHING = 5


def read_log(path: Path) -> list[dict[str, object]]:
    """The entries of a training log. Of a step that ran twice (after a resume) the last one counts."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = {(entry["step"], entry.get("task")): entry for entry in entries}
    return sorted(last.values(), key=lambda entry: entry["step"])


def draw_training(entries: list[dict[str, object]], out: Path) -> None:
    """Loss above, share of right answers by task below, over the millions of tokens seen."""
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 6), layout="constrained")
    losses = [(entry["tokens"] / 1e6, entry["loss"]) for entry in entries if "loss" in entry]
    tokens, values = np.array(losses).T
    above.plot(tokens, values, color="0.8", linewidth=0.8)
    kernel = np.ones(SMOOTHING) / SMOOTHING
    middle = slice(SMOOTHING // 2, -(SMOOTHING // 2))
    above.plot(tokens[middle], np.convolve(values, kernel, mode="valid"), color="tab:blue")
    above.set(yscale="log", ylabel="loss of a batch (nats a token)")
    for task in sorted({str(entry["task"]) for entry in entries if "task" in entry}):
        points = [
            (entry["tokens"] / 1e6, 100 * entry["right"]) for entry in entries if entry.get("task") == task
        ]
        below.plot(*np.array(points).T, marker=".", label=task)
    below.set(xlabel="million tokens", ylabel="right of unseen cases (%), greedy", ylim=(0, 102))
    below.legend(loc="lower right")
    save(figure, out)


def draw_window(losses: dict[str, dict[str, float]], out: Path) -> None:
    """The loss of a pass key's digits by position, with YaRN and without."""
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for name, by_position in losses.items():
        axes.plot([int(each) for each in by_position], list(by_position.values()), marker=".", label=name)
    axes.axvline(N_CTX, color="0.6", linestyle=":")
    axes.text(N_CTX, axes.get_ylim()[1], " native window", va="top", color="0.4")
    axes.set(xlabel="position (tokens)", ylabel="loss of the pass key\n(nats a token)")
    axes.legend(loc="center left")
    save(figure, out)


def save(figure: plt.Figure, out: Path) -> None:
    """Write a picture without a time stamp, so that the same data gives the same file."""
    figure.savefig(out, dpi=90, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Draw the pictures for which there is data."""
    parser = argparse.ArgumentParser(description="Draw the miniature's curves.")
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    log, figures = options.work / "log.jsonl", options.work / "figures.json"
    if log.exists():
        draw_training(read_log(log), options.out / "training.png")
    for measured in json.loads(figures.read_text(encoding="utf-8")).values() if figures.exists() else ():
        if isinstance(measured, dict) and "loss" in measured.get("past the window", {}):
            draw_window(measured["past the window"]["loss"], options.out / "window.png")


if __name__ == "__main__":
    main()
