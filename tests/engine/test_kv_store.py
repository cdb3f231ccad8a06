"""The KV store with the real engine: another process gets the prefilled state back, to the bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from qwq_local.engine.kv_entry import SUFFIX, Entry, ModelIdentity
from qwq_local.engine.kv_store import KvFolder, KvStore, Prefilled
from qwq_local.engine.library import library
from qwq_local.engine.model import LoadedModel
from qwq_local.errors import Aborted, AbortFlag
from tests.conftest import load
from tests.engine.kv_programs import (
    ALL_BUT_THE_END,
    MIN_TOKENS,
    MODEL,
    SETTINGS,
    TIMEOUT_S,
    a_text,
    keep,
    prefill,
    read_in_another_process,
    restore,
    started,
    what_follows,
)
from tests.single_sequence import SingleSequence
from tests.tiny_models import constant_model

N_EXACT = 90
MIXES = {
    "f16": SETTINGS,
    "f16 with flash attention": replace(SETTINGS, flash_attention=True),
    "q8_0": replace(SETTINGS, flash_attention=True, kv_type_k="q8_0", kv_type_v="q8_0"),
    "q4_0": replace(SETTINGS, flash_attention=True, kv_type_k="q4_0", kv_type_v="q4_0"),
    "YaRN 2": replace(SETTINGS, n_ctx=2048, yarn_factor=2.0, yarn_origin=1024),
    "YaRN 4 with q8_0": replace(
        SETTINGS, flash_attention=True, kv_type_k="q8_0", kv_type_v="q8_0", yarn_factor=4.0, yarn_origin=512
    ),
}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick model of 2 KiB of keys and values a token, for tests of sizes and files."""
    return constant_model(tmp_path_factory.mktemp("model"), "a", layers=4, hidden=128)


@pytest.fixture(scope="module")
def loaded(model_file: Path) -> Iterator[LoadedModel]:
    with closing(load(model_file)) as model:
        yield model


@pytest.fixture(scope="module")
def miniature_model(miniature: Callable[[str], Path]) -> Iterator[LoadedModel]:
    with closing(load(miniature("Q8_0"))) as model:
        yield model


@pytest.fixture
def folder(tmp_path: Path) -> KvFolder:
    return KvFolder(tmp_path / "kv", 1 << 30)


@pytest.fixture
def store(folder: KvFolder) -> KvStore:
    return KvStore(folder, min_tokens=MIN_TOKENS)


@pytest.fixture
def context(loaded: LoadedModel) -> Iterator[SingleSequence]:
    with closing(SingleSequence(loaded, SETTINGS)) as made:
        yield made


def kept(
    store: KvStore, context: SingleSequence, tokens: Sequence[int], model: ModelIdentity = MODEL
) -> None:
    prefill(context, tokens)
    assert keep(store, context, tokens, model) == []


def restored(store: KvStore, loaded: LoadedModel, tokens: Sequence[int], **changes: object) -> int:
    """How many tokens a new context gets."""
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    with closing(SingleSequence(loaded, settings)) as context:
        return restore(store, context, tokens)


def test_another_process_continues_bit_for_bit_like_a_fresh_prefill(
    miniature_model: LoadedModel, miniature: Callable[[str], Path], folder: KvFolder, store: KvStore
) -> None:
    """Logits and greedy tokens for KV types, flash attention, YaRN factors; the last token is computed."""
    tokens, expected = a_text(miniature_model, N_EXACT), []
    for settings in MIXES.values():
        with closing(SingleSequence(miniature_model, settings)) as fresh:
            # The same two batches as after the store: the last token alone.
            prefill(fresh, tokens[:-1])
            prefill(fresh, tokens)
            expected.append([len(tokens), 1, *what_follows(fresh)])
        with closing(SingleSequence(miniature_model, settings)) as saving:
            kept(store, saving, tokens)
    cases = [(settings, tokens) for settings in MIXES.values()]
    assert len(folder.entries()) == len(MIXES)
    assert len({str(follows) for follows in expected}) == len(MIXES), "the mixes must differ to tell apart"
    assert read_in_another_process(miniature("Q8_0"), folder.path, cases) == expected


@pytest.mark.parametrize("mix", MIXES)
def test_a_second_question_gets_the_answer_of_the_original_context(
    miniature_model: LoadedModel, store: KvStore, mix: str
) -> None:
    """Logits are equal to the bit: cutting off the first question is the same in store and cache."""
    text = a_text(miniature_model, N_EXACT)
    first, second = (text + miniature_model.vocabulary.encode_text(asked) for asked in ("Why?", "How many?"))
    with closing(SingleSequence(miniature_model, MIXES[mix])) as reader:
        kept(store, reader, first)
        prefill(reader, second)
        expected = what_follows(reader)
    with closing(SingleSequence(miniature_model, MIXES[mix])) as later:
        assert restore(store, later, second) >= len(text)
        assert prefill(later, second) <= len(second) - len(text)
        assert what_follows(later) == expected


def test_ten_questions_to_one_text_cost_one_prefill_and_one_file(
    loaded: LoadedModel, folder: KvFolder, store: KvStore
) -> None:
    text, computed = a_text(loaded, 400), []
    for number in range(10):
        question = text + loaded.vocabulary.encode_text(f" ReplyRequest {number}: what is it?")
        with closing(SingleSequence(loaded, SETTINGS)) as context:
            restore(store, context, question)
            computed.append(prefill(context, question))
            assert keep(store, context, question) == []
    assert computed[0] > 400
    assert max(computed[1:]) < 32
    assert len(folder.entries()) == 1


def test_the_longest_common_prefix_wins(loaded: LoadedModel, context: SingleSequence, store: KvStore) -> None:
    text = a_text(loaded, 500)
    other = a_text(loaded, 300, "cat")
    for tokens in (text[:200], other, text[:350] + other[:100], text[:120] + other[:150]):
        context.truncate(0)
        kept(store, context, tokens)
    assert restored(store, loaded, text) == 350
    assert restored(store, loaded, text[:200]) == 200
    assert restored(store, loaded, text[:150] + other) == 150
    assert restored(store, loaded, other[:20] + text) == 20
    assert restored(store, loaded, a_text(loaded, 100, "Fox")[1:]) == 0


def test_a_longer_entry_replaces_its_own_prefix(
    loaded: LoadedModel, context: SingleSequence, folder: KvFolder, store: KvStore
) -> None:
    """A conversation leaves one file; another one that shares only a part stays."""
    text, other = a_text(loaded, 600), a_text(loaded, 300, "cat")
    kept(store, context, text[:200])
    kept(store, context, text[:100] + other[:100])
    kept(store, context, text[:200] + other[:20] + text[200:400])
    assert sorted(entry.record.n_tokens for entry in folder.entries()) == [200, 420]
    kept(store, context, text[:200] + text[300:600])
    assert sorted(entry.record.n_tokens for entry in folder.entries()) == [200, 420, 500]


def test_only_prefilled_tokens_that_are_not_stored_yet_are_written(
    loaded: LoadedModel, context: SingleSequence, folder: KvFolder, store: KvStore
) -> None:
    text = a_text(loaded, 400)
    kept(store, context, text[: MIN_TOKENS - 1])
    assert folder.entries() == []
    kept(store, context, text[:MIN_TOKENS])
    kept(store, context, text[: 2 * MIN_TOKENS - 1])
    assert [entry.record.n_tokens for entry in folder.entries()] == [MIN_TOKENS]
    kept(store, context, text[: 2 * MIN_TOKENS])
    assert [entry.record.n_tokens for entry in folder.entries()] == [2 * MIN_TOKENS]


def test_a_stopped_prefill_is_stored_as_far_as_it_came_and_no_answer_is(
    loaded: LoadedModel, context: SingleSequence, folder: KvFolder, store: KvStore
) -> None:
    prompt = a_text(loaded, 200)
    prefill(context, prompt)
    what_follows(context)
    assert keep(store, context, prompt) == []
    assert [entry.record.n_tokens for entry in folder.entries()] == [200]
    longer = a_text(loaded, 600, "cat")
    prefill(context, longer[:300])
    assert keep(store, context, longer) == []
    assert restored(store, loaded, longer) == 300


def test_tokens_in_the_context_are_not_read_again(
    loaded: LoadedModel, context: SingleSequence, folder: KvFolder, store: KvStore
) -> None:
    text = a_text(loaded, 300)
    kept(store, context, text)
    (entry,) = folder.entries()
    os.utime(entry.path, (1, 1))
    assert restore(store, context, text[:250]) == 250
    assert len(context.tokens) == 300
    assert folder.entries()[0].used_s == 1, "it was read, or touched"


def test_reading_an_entry_marks_it_as_used(
    loaded: LoadedModel, context: SingleSequence, store: KvStore
) -> None:
    text, other = a_text(loaded, 100), a_text(loaded, 120, "cat")
    for number, tokens in enumerate((text, other), start=1):
        kept(store, context, tokens)
        os.utime(store.folder.entries()[0].path, (number, number))
    assert [entry.record.n_tokens for entry in store.folder.entries()] == [120, 100]
    assert restored(store, loaded, text) == 100
    assert [entry.record.n_tokens for entry in store.folder.entries()] == [100, 120]


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_type_k": "q8_0"},
        {"flash_attention": True},
        {"flash_attention": None},
        {"yarn_factor": 2.0, "yarn_origin": 1024},
        {"n_ctx": 256},
    ],
)
def test_another_context_gets_nothing_and_leaves_the_entry_alone(
    loaded: LoadedModel,
    context: SingleSequence,
    folder: KvFolder,
    store: KvStore,
    changes: dict[str, object],
) -> None:
    text = a_text(loaded, 300)
    kept(store, context, text)
    assert restored(store, loaded, text[:250], **changes) == 0
    assert len(folder.entries()) == 1
    assert restored(store, loaded, text[:250]) == 250


def test_another_model_gets_nothing_also_where_its_shape_is_the_same(
    loaded: LoadedModel, context: SingleSequence, store: KvStore
) -> None:
    text = a_text(loaded, 200)
    kept(store, context, text, ModelIdentity("other header"))
    kept(store, context, text, ModelIdentity("header", "b" * 64))
    with closing(SingleSequence(loaded, SETTINGS)) as fresh:
        assert restore(store, fresh, text, ModelIdentity("header", "a" * 64)) == 0
        assert restore(store, fresh, text, ModelIdentity("copied file", "b" * 64)) == 200
    assert restored(store, loaded, text) == 200


def test_an_entry_that_llama_cpp_refuses_leaves_an_empty_cache(
    loaded: LoadedModel,
    miniature: Callable[[str], Path],
    context: SingleSequence,
    store: KvStore,
    tmp_path: Path,
) -> None:
    """The same key, verified, but another layout: V transposed or not."""
    text, file = a_text(loaded, 100), tmp_path / "state"
    prefill(context, text)
    context.write_state(file)
    settings = replace(SETTINGS, flash_attention=True)
    with closing(SingleSequence(loaded, settings)) as other:
        prefill(other, text[:20])
        assert not other.read_state(file, len(text))
        assert list(other.tokens) == []
        assert prefill(other, text) == len(text)


def test_private_reads_and_leaves_no_trace(
    loaded: LoadedModel, context: SingleSequence, folder: KvFolder, store: KvStore
) -> None:
    private = KvStore(folder, min_tokens=MIN_TOKENS, is_private=True)
    text = a_text(loaded, 300)
    kept(private, context, text)
    assert not folder.path.exists()
    kept(store, context, text[:200])
    (entry,) = folder.entries()
    os.utime(entry.path, (1, 1))
    kept(private, context, text)
    assert restored(private, loaded, text) == 200
    assert [each.used_s for each in folder.entries()] == [1]
    damage(entry)
    assert restored(private, loaded, text) == 0
    assert entry.path.exists()


def damage(entry: Entry) -> None:
    """Change one byte in the middle of the keys."""
    with entry.path.open("r+b") as file:
        file.seek(entry.record.state_bytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def test_a_damaged_entry_is_removed_and_the_next_best_is_read(
    loaded: LoadedModel, context: SingleSequence, folder: KvFolder, store: KvStore
) -> None:
    text, other = a_text(loaded, 400), a_text(loaded, 100, "cat")
    kept(store, context, text[:200] + other)
    kept(store, context, text[:350])
    entry = next(entry for entry in folder.entries() if entry.record.n_tokens == 350)
    damage(entry)
    assert restored(store, loaded, text) == 200
    assert not entry.path.exists()


def test_an_abort_while_verifying_takes_effect(
    loaded: LoadedModel, context: SingleSequence, store: KvStore
) -> None:
    text, abort = a_text(loaded, 200), AbortFlag()
    kept(store, context, text)
    abort.set()
    with closing(SingleSequence(loaded, SETTINGS, abort)) as fresh, pytest.raises(Aborted):
        restore(store, fresh, text, abort=abort)


def test_an_entry_is_not_read_where_prefilling_is_as_quick(
    loaded: LoadedModel, context: SingleSequence, store: KvStore
) -> None:
    """A large entry with little use, on a machine that prefills very quickly."""
    text = a_text(loaded, 600)
    prefill(context, text)
    assert list(store.keep(context, MODEL, Prefilled(text, token_s=1e-9))) == []
    assert restored(store, loaded, text) == 0


def test_the_bytes_of_an_entry_are_those_of_the_keys_and_values(
    loaded: LoadedModel, context: SingleSequence, folder: KvFolder, store: KvStore
) -> None:
    """16 bytes a token beside them (its id, position and sequence), and less than 4 KiB in all."""
    kept(store, context, a_text(loaded, 500))
    (entry,) = folder.entries()
    model_bytes = library()
    handle = loaded.handle
    width = model_bytes.llama_model_n_embd(handle) // model_bytes.llama_model_n_head(handle)
    kv_width = width * model_bytes.llama_model_n_head_kv(handle)
    per_token = 2 * 2 * kv_width * model_bytes.llama_model_n_layer(handle)
    assert 0 <= entry.file_bytes - 500 * (per_token + 16) < 4096
    assert context.state_bytes + 4 * 500 == pytest.approx(entry.record.state_bytes, abs=16)


def test_reading_and_writing_much_is_announced(
    loaded: LoadedModel, context: SingleSequence, folder: KvFolder
) -> None:
    text = a_text(loaded, 300)
    prefill(context, text)
    store = KvStore(folder, min_tokens=MIN_TOKENS, many_bytes=600_000)
    said = ["keeping 300 prefilled tokens for the next question (0.6 MiB)."]
    assert keep(store, context, text) == said
    with closing(SingleSequence(loaded, SETTINGS)) as fresh:
        said = ["reading 300 prefilled tokens (0.6 MiB)."]
        assert list(store.restore(fresh, MODEL, text, AbortFlag())) == said
        assert len(fresh.tokens) == 300
        fresh.truncate(0)
        assert list(KvStore(folder).restore(fresh, MODEL, text, AbortFlag())) == []
        assert len(fresh.tokens) == 300


def test_only_the_user_can_read_the_entries(
    loaded: LoadedModel, context: SingleSequence, folder: KvFolder, store: KvStore
) -> None:
    before = os.umask(0)
    try:
        kept(store, context, a_text(loaded, 100))
    finally:
        os.umask(before)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert [entry.path.stat().st_mode & 0o777 for entry in folder.entries()] == [0o600]


def test_a_failure_to_store_is_reported_and_leaves_nothing(
    loaded: LoadedModel, context: SingleSequence, tmp_path: Path
) -> None:
    text = a_text(loaded, 300)
    prefill(context, text)
    small = KvStore(KvFolder(tmp_path / "small", 100_000), min_tokens=MIN_TOKENS)
    (said,) = keep(small, context, text)
    assert "--set kv_store" in said
    assert list((tmp_path / "small").iterdir()) == []
    (tmp_path / "file").write_text("")
    nowhere = KvStore(KvFolder(tmp_path / "file" / "kv", 1 << 30), min_tokens=MIN_TOKENS)
    assert "not kept" in keep(nowhere, context, text)[0]
    assert restore(nowhere, context, a_text(loaded, 50, "cat")) < 9


@pytest.mark.parametrize("limit", [-400_000, ALL_BUT_THE_END])
def test_a_full_disk_is_reported_and_leaves_nothing(model_file: Path, folder: KvFolder, limit: int) -> None:
    """Files may not grow beyond half of the state, or its last bytes; in a process of its own."""
    process = started("save", model_file, folder.path, 0, 1, limit)
    _, complaint = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "is not kept" in complaint.decode()
    assert list(folder.path.iterdir()) == []


def test_two_processes_at_once_are_safe(model_file: Path, folder: KvFolder) -> None:
    """They store the same texts and others, and remove each other's entries to make room."""
    processes = [started("save", model_file, folder.path, first, 12, 0) for first in (0, 4)]
    for process in processes:
        _, complaint = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, complaint.decode()
    entries = folder.entries()
    assert entries
    for entry in entries:
        entry.verify()
    assert {path.suffix for path in folder.path.iterdir()} == {SUFFIX}


@pytest.mark.parametrize("killed_at", [1_000, 500_000, "in the trailer"])
def test_a_kill_while_saving_leaves_a_usable_store(
    loaded: LoadedModel, context: SingleSequence, model_file: Path, store: KvStore, killed_at: int | str
) -> None:
    """The kernel kills at the limit. The remains are not an entry, and are removed once they are old."""
    folder = store.folder
    if isinstance(killed_at, str):
        kept(store, context, a_text(loaded, 400))
        (entry,) = folder.entries()
        killed_at = entry.record.state_bytes + 10
    process = started("save", model_file, folder.path, 7, 1, killed_at)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -signal.SIGXFSZ
    (half_written,) = (file for file in folder.path.iterdir() if file.suffix != SUFFIX)
    assert half_written.stat().st_size <= killed_at
    text = a_text(loaded, 300, "7 fox")
    assert restored(store, loaded, text) < 8
    kept(store, context, text)
    assert half_written.exists(), "it might be another process's"
    os.utime(half_written, (1, 1))
    kept(store, context, a_text(loaded, 300, "cat"))
    assert not half_written.exists()
    assert restored(store, loaded, text) == 300
