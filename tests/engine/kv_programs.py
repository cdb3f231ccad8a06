"""Programs that the tests of the KV store run in their own processes: reading back, saving.

python -m tests.engine.kv_programs read MODEL FOLDER CASES
python -m tests.engine.kv_programs save MODEL FOLDER FIRST COUNT FILE_LIMIT
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from qwq_local.engine.api import ContextSettings, SamplerSettings
from qwq_local.engine.kv_entry import ModelIdentity
from qwq_local.engine.kv_store import KvFolder, KvStore, Prefilled
from qwq_local.engine.library import library
from qwq_local.engine.model import LoadedModel, LoadSettings, drained, load_model
from qwq_local.errors import AbortFlag
from tests.single_sequence import SingleSequence

ROOT = Path(__file__).parent.parent.parent
MODEL = ModelIdentity("header")
SETTINGS = ContextSettings(n_ctx=1024, flash_attention=False, threads=1)
MIN_TOKENS = 64
TIMEOUT_S = 120
ALL_BUT_THE_END = -1


def a_text(model: LoadedModel, n_tokens: int, word: str = "fox") -> list[int]:
    """A text that does not repeat itself, in tokens."""
    text = " ".join(f"The {word} number {i} jumps over {i * i} lazy dogs." for i in range(n_tokens))
    return model.vocabulary.encode_text(text)[:n_tokens]


def prefill(context: SingleSequence, tokens: Sequence[int]) -> int:
    """Prefill; returns how many tokens were computed."""
    last = list(context.prefill(tokens))[-1]
    return last.total - last.cached


def restore(
    store: KvStore,
    context: SingleSequence,
    tokens: Sequence[int],
    model: ModelIdentity = MODEL,
    abort: AbortFlag | None = None,
) -> int:
    """Restore from the store; returns how many tokens of the prompt the context has."""
    reading = store.restore(context, model, tokens, abort or AbortFlag())
    while True:
        try:
            next(reading)
        except StopIteration as finished:
            n_tokens: int = finished.value
            return n_tokens


def keep(
    store: KvStore, context: SingleSequence, tokens: Sequence[int], model: ModelIdentity = MODEL
) -> list[str]:
    """Store the prompt's state; returns the notices."""
    return list(store.keep(context, model, Prefilled(tokens)))


def what_follows(context: SingleSequence, n_tokens: int = 12) -> tuple[str, list[int]]:
    """A digest of the logits after the last token, and the tokens sampled greedily."""
    logits = library().llama_get_logits_ith(context._handle, -1)
    row = ctypes.string_at(logits, 4 * context.vocabulary.size)
    context.start_sampling(SamplerSettings(temperature=0))
    sampled = []
    for _ in range(n_tokens):
        sampled.append(context.sample())
        context.append(sampled[-1])
    return hashlib.sha256(row).hexdigest(), sampled


def started(*arguments: object) -> subprocess.Popen[bytes]:
    """One of these programs in a process of its own."""
    variables = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'convert'}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "tests.engine.kv_programs", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables)


def read_in_another_process(
    model: Path, folder: Path, cases: Sequence[tuple[ContextSettings, Sequence[int]]]
) -> list[list[object]]:
    """For each case: restored tokens, computed tokens, digest of the logits, sampled tokens."""
    described = json.dumps([[asdict(settings), list(tokens)] for settings, tokens in cases])
    process = started("read", model, folder, described)
    lines, complaint = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, complaint.decode()
    return [json.loads(line) for line in lines.splitlines()]


def _read(model: LoadedModel, folder: Path, described: str) -> None:
    store = KvStore(KvFolder(folder))
    for values, tokens in json.loads(described):
        with closing(SingleSequence(model, ContextSettings(**values))) as context:
            restored = restore(store, context, tokens)
            computed = prefill(context, tokens)
            print(json.dumps([restored, computed, *what_follows(context)]))


def _save(model: LoadedModel, folder: Path, first: int, count: int, file_limit: int) -> None:
    """Store `count` texts and read each back; the store has room for two of them."""
    store = KvStore(KvFolder(folder, 1 << 21), min_tokens=MIN_TOKENS)
    with closing(SingleSequence(model, SETTINGS)) as context:
        for number in range(first, first + count):
            text = a_text(model, 400, f"{number} fox")
            prefill(context, text)
            print(number, flush=True)
            if file_limit == ALL_BUT_THE_END:
                _limit_files(context.state_bytes + 4 * len(text) - 100, is_deadly=False)
            elif file_limit:
                _limit_files(abs(file_limit), is_deadly=file_limit > 0)
            if said := keep(store, context, text):
                sys.exit(said[0])
            with closing(SingleSequence(model, SETTINGS)) as fresh:
                restore(store, fresh, text)
                prefill(fresh, text)


def _limit_files(n_bytes: int, *, is_deadly: bool) -> None:
    """Limit the size of files: further writes fail as on a full disk, or the kernel kills the process."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if is_deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


if __name__ == "__main__":
    with closing(drained(load_model(Path(sys.argv[2]), LoadSettings(), AbortFlag()))) as loaded:
        if sys.argv[1] == "read":
            _read(loaded, Path(sys.argv[3]), sys.argv[4])
        else:
            _save(loaded, Path(sys.argv[3]), *map(int, sys.argv[4:7]))
