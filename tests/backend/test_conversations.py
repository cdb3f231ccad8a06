"""The local backend with the real miniature, as a chat uses it: stopped, continued, changed, asked again."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from qwq_local.backend.api import Backend, ReplyRequest
from qwq_local.backend.local import LocalBackend
from qwq_local.backend.prefill_cache import PrefillCache
from qwq_local.dialogue.control import Opening, ReplyControl
from qwq_local.dialogue.conversation import Message, Role
from qwq_local.engine.api import JsonSchema
from qwq_local.errors import Aborted, AbortFlag, EngineError, PromptTooLong, UsageError
from qwq_local.events import (
    Answer,
    CloseReason,
    Event,
    Finished,
    FinishReason,
    Generated,
    Loading,
    Notice,
    Planned,
    Prefill,
    Prompted,
    Steered,
    Thinking,
    ThinkingClosed,
)
from qwq_local.paths import Directories
from qwq_local.profiles.keys import Profile
from qwq_local.profiles.layers import profile_folders, resolve

STRAWBERRY = Message(Role.USER, "How many r's are in the word strawberry?")
# With the miniature's budgets just past its native window.
LONG, LONGER = (Message(Role.USER, f"How many r's? {'hello ' * n}") for n in (60, 70))
RASPBERRY = Message(Role.USER, "How many r's are in the word raspberry?")


def profile(tmp_path: Path, *settings: str) -> Profile:
    folders = profile_folders(Directories(tmp_path, tmp_path, tmp_path))
    usual = ("temperature=0", "threads=1", "seed=1", "kv_store_min_tokens=8")
    return resolve("miniature", "chat", folders, {}, [*usual, *settings]).profile


@pytest.fixture
def backend(miniature: Callable[[str], Path], tmp_path: Path) -> Iterator[LocalBackend]:
    made = LocalBackend(miniature("Q8_0"), profile(tmp_path), 1, AbortFlag(), takes_largest=True)
    with closing(made):
        yield made


def ask(backend: Backend, *messages: Message, **more: object) -> list[Event]:
    return list(backend.reply(replace(ReplyRequest(messages, wants_tokens=True), **more)))  # type: ignore[arg-type]


def finished(events: Sequence[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def planned(events: Sequence[Event]) -> Planned:
    return next(event for event in events if isinstance(event, Planned))


def cached(events: Sequence[Event]) -> int:
    return next(event.cached for event in events if isinstance(event, Prefill))


def notices(events: Sequence[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice) and "thinking of" not in event.text]


def opening_of(events: Sequence[Event], known: tuple[int, ...] = ()) -> Opening:
    """The opening of a turn as an archive stores it: the prompt's ids and all that followed."""
    for event in events:
        if isinstance(event, Prompted):
            prompt = event.tokens
        if isinstance(event, Generated):
            known = (*known[: event.start], *event.tokens)
    return Opening(prompt, known)


def text(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Thinking | Steered | Answer))


def stopped(backend: Backend, n_pieces: int, *messages: Message, **more: object) -> list[Event]:
    """The events of a reply that is stopped after `n_pieces` pieces of text."""
    events: list[Event] = []
    question = replace(ReplyRequest(messages, wants_tokens=True), **more)  # type: ignore[arg-type]
    for event in backend.reply(question):
        events.append(event)
        if sum(isinstance(each, Thinking | Answer) for each in events) == n_pieces:
            backend.stop()
    return events


def test_the_ids_of_the_prompt_come_before_it_is_read_and_those_of_the_reply_are_complete(
    backend: LocalBackend,
) -> None:
    events = ask(backend, STRAWBERRY)
    kinds = [type(event) for event in events]
    assert kinds[kinds.index(Planned) + 1] is Prompted
    opening = opening_of(events)
    assert len(opening.prompt) == planned(events).prompt_tokens == finished(events).stats.prompt_tokens
    pieces = b"".join(map(backend.weights.vocabulary.piece, opening.generated)).decode()
    assert pieces == f"{finished(events).thinking}</think>\n\n{finished(events).answer}"


@pytest.mark.parametrize("n_pieces", [1, 12, -4])
def test_a_stopped_turn_continues_to_the_same_end(backend: LocalBackend, n_pieces: int) -> None:
    whole = ask(backend, STRAWBERRY)
    n_whole = sum(isinstance(event, Thinking | Answer) for event in whole)
    first = stopped(backend, n_pieces % n_whole, STRAWBERRY)
    assert finished(first).reason is FinishReason.INTERRUPTED
    opening = opening_of(first)
    rest = ask(backend, STRAWBERRY, opening=opening)

    assert text(first) + text(rest) == text(whole)
    assert (finished(rest).thinking, finished(rest).answer) == (
        finished(whole).thinking,
        finished(whole).answer,
    )
    assert opening_of(rest, opening.generated) == opening_of(whole)
    assert planned(rest).prompt_tokens == planned(whole).prompt_tokens
    assert planned(rest).thinking_budget == planned(whole).thinking_budget
    assert cached(rest) >= len(opening.prompt) + len(opening.generated) - 2
    stats = finished(rest).stats
    assert (stats.cached_tokens, stats.resumed_tokens) == (len(opening.prompt), len(opening.generated))
    assert len(opening.generated) - stats.resumed_cached in (0, 1, 2)
    assert planned(rest).ledger.free == planned(whole).ledger.free - len(opening.generated)


def test_another_process_continues_a_turn_from_the_history(
    miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    """A stopped turn is kept whole, its thinking too."""

    def made() -> LocalBackend:
        once = PrefillCache(tmp_path, profile(tmp_path))
        return LocalBackend(miniature("Q8_0"), profile(tmp_path), 1, AbortFlag(), once, takes_largest=True)

    with closing(made()) as before:
        whole = ask(before, STRAWBERRY)
        assert list(before.keep()) == []
        first = stopped(before, 20, STRAWBERRY)
        assert list(before.keep()) == []
    opening = opening_of(first)
    with closing(made()) as after:
        rest = ask(after, STRAWBERRY, opening=opening)
        assert cached(rest) >= len(opening.prompt) + len(opening.generated) - 2
        assert finished(rest).answer == finished(whole).answer


def test_a_stop_ends_only_the_running_turn(backend: LocalBackend) -> None:
    backend.stop()
    whole = ask(backend, STRAWBERRY)
    assert finished(whole).reason is FinishReason.STOP
    backend.stop()
    first = stopped(backend, 3, STRAWBERRY)
    assert finished(first).reason is FinishReason.INTERRUPTED
    backend.stop()
    assert text(ask(backend, STRAWBERRY)) == text(whole)


def test_a_flag_set_by_a_signal_handler_stops_only_that_reply(
    miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    abort = AbortFlag()
    with closing(LocalBackend(miniature("Q8_0"), profile(tmp_path), 1, abort)) as backend:
        for event in backend.reply(ReplyRequest([STRAWBERRY])):
            if isinstance(event, Thinking):
                abort.set()
        assert finished([event]).reason is FinishReason.INTERRUPTED
        assert finished(ask(backend, STRAWBERRY)).reason is FinishReason.STOP
        abort.set()
        assert finished(ask(backend, STRAWBERRY)).reason is FinishReason.INTERRUPTED


def test_after_a_stop_while_loading_the_next_reply_loads_again(
    miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    with closing(LocalBackend(miniature("Q8_0"), profile(tmp_path), 1, AbortFlag())) as backend:
        events = backend.reply(ReplyRequest([STRAWBERRY]))
        assert isinstance(next(events), Loading)
        backend.stop()
        with pytest.raises(Aborted):
            list(events)
        again = ask(backend, STRAWBERRY)
        assert isinstance(again[0], Loading)
        assert finished(again).reason is FinishReason.STOP


def test_an_abandoned_reply_does_not_stop_the_next(backend: LocalBackend) -> None:
    events = backend.reply(ReplyRequest([STRAWBERRY]))
    for event in events:
        if isinstance(event, Thinking):
            break
    backend.stop()
    del events
    backend.stop()
    assert finished(ask(backend, STRAWBERRY)).reason is FinishReason.STOP


def test_a_turn_is_stopped_from_another_thread_while_it_pauses(backend: LocalBackend) -> None:
    ask(backend, RASPBERRY)
    control = ReplyControl()
    control.pause()
    question = ReplyRequest([STRAWBERRY], control=control)
    events: list[Event] = []
    has_read = threading.Event()

    def read() -> None:
        for event in backend.reply(question):
            events.append(event)
            if isinstance(event, Prefill) and event.done == event.total:
                has_read.set()

    worker = threading.Thread(target=read)
    worker.start()
    assert has_read.wait(60)
    backend.stop()
    worker.join(60)
    assert not worker.is_alive()
    assert (finished(events).reason, finished(events).thinking) == (FinishReason.INTERRUPTED, "")


def test_steering_and_ending_the_thinking_keep_the_cache(backend: LocalBackend) -> None:
    control = ReplyControl()
    events: list[Event] = []
    for event in backend.reply(ReplyRequest([STRAWBERRY], control=control, wants_tokens=True)):
        events.append(event)
        if sum(isinstance(each, Thinking) for each in events) == 8 and isinstance(event, Thinking):
            control.steer("The letters are counted.")
            control.answer_now()
    closed = next(event for event in events if isinstance(event, ThinkingClosed))
    assert closed.reason is CloseReason.ASKED
    assert Steered("The letters are counted.") in events
    assert finished(events).answer
    prefills = [event for event in events if isinstance(event, Prefill)]
    assert {event.total for event in prefills} == {planned(events).prompt_tokens}
    # A continued turn keeps what was steered.
    opening = opening_of(events)
    again = ask(backend, STRAWBERRY, opening=Opening(opening.prompt, opening.generated[:-3]))
    assert finished(again).thinking == finished(events).thinking
    assert finished(again).answer == finished(events).answer


def test_a_turn_lost_before_its_prompt_was_recorded_starts_again(backend: LocalBackend) -> None:
    whole = ask(backend, STRAWBERRY)
    again = ask(backend, STRAWBERRY, opening=Opening((), ()))
    assert (text(again), opening_of(again)) == (text(whole), opening_of(whole))


def test_an_answer_under_a_schema_is_not_continued(backend: LocalBackend) -> None:
    opening = opening_of(stopped(backend, 3, STRAWBERRY))
    with pytest.raises(UsageError, match="ask again"):
        ask(backend, STRAWBERRY, opening=opening, constraint=JsonSchema({"type": "object"}))


def test_tokens_are_counted_before_and_after_loading(
    miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    """The vocabulary is loaded once: the second count needs no file."""
    path = Path(shutil.copy(miniature("Q8_0"), tmp_path / "model.gguf"))
    with closing(LocalBackend(path, profile(tmp_path), 1, AbortFlag())) as backend:
        n_tokens = backend.count_tokens("How many r's?")
        plan = backend.dry_run(ReplyRequest([STRAWBERRY]))
        path.rename(tmp_path / "elsewhere.gguf")
        assert backend.count_tokens("How many r's?") == n_tokens > 3
        assert backend.count_tokens("cafe\u0301") == backend.count_tokens("café")
        assert backend.dry_run(ReplyRequest([STRAWBERRY])).prompt_tokens == plan.prompt_tokens
        (tmp_path / "elsewhere.gguf").rename(path)
        assert planned(ask(backend, STRAWBERRY)).prompt_tokens == plan.prompt_tokens
        assert backend.count_tokens("How many r's?") == n_tokens


def test_a_dry_run_plans_with_the_existing_context(backend: LocalBackend) -> None:
    question = ReplyRequest([STRAWBERRY], seed=1)
    assert backend.dry_run(question) == planned(ask(backend, STRAWBERRY))
    ask(backend, LONG)
    longer = ReplyRequest([LONGER], seed=1)
    expected_plan = backend.dry_run(longer)
    assert expected_plan == planned(list(backend.reply(longer)))
    assert expected_plan.yarn_factor == 2


def test_the_ledger_counts_thinking_that_was_left_out(backend: LocalBackend) -> None:
    assert planned(ask(backend, STRAWBERRY, dropped_thinking=123)).ledger.thinking_dropped == 123
    assert backend.dry_run(ReplyRequest([STRAWBERRY], dropped_thinking=7)).ledger.thinking_dropped == 7


def test_a_conversation_outgrows_the_native_window_and_returns_to_it(
    backend: LocalBackend, tmp_path: Path
) -> None:
    """Its budgets are small: a turn needs a quarter of the window."""
    backend.adopt(profile(tmp_path, "thinking_budget=100", "answer_reserve=30"))
    first = ask(backend, STRAWBERRY)
    assert (planned(first).n_ctx, planned(first).yarn_factor) == (1024, 1)
    second = ask(backend, Message(Role.USER, "hello " * 8))
    assert (planned(second).n_ctx, notices(second)) == (1024, [])
    long = stopped(backend, 1, Message(Role.USER, "hello " * 200))
    assert planned(long).yarn_factor == 2
    assert [line.split(":")[1] for line in notices(long)] == [
        " YaRN 2 over 1,024 from here, the prompt is read anew."
    ]
    short = ask(backend, STRAWBERRY)
    assert (planned(short).n_ctx, planned(short).yarn_factor) == (1024, 1)
    assert "YaRN is off" in notices(short)[0]
    assert text(short) == text(first)


def test_a_turn_under_yarn_is_continued_under_yarn(backend: LocalBackend) -> None:
    """The short turn would fit the native window, but stays under YaRN."""
    control = ReplyControl()
    control.answer_now()
    first = stopped(backend, 3, LONG, control=control)
    assert planned(first).yarn_factor == 2
    assert finished(first).answer
    rest = stopped(backend, 1, LONG, opening=opening_of(first))
    assert (planned(rest).yarn_factor, planned(rest).n_ctx) == (2, planned(first).n_ctx)
    assert notices(rest) == []


def test_a_full_context_grows_for_a_continued_reply(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    """Thinking fills a window of 256 tokens; the answer continues in a larger one, from a copied cache."""
    settings = ("thinking_budget=64", "answer_reserve=16", "max_tokens=0", "loop_guard=off")
    with closing(LocalBackend(miniature("Q8_0"), profile(tmp_path, *settings), 1, AbortFlag())) as backend:
        first = ask(backend, Message(Role.USER, "hello " * 15))
        assert planned(first).n_ctx == 256
        opening = opening_of(first)
        filler = opening.generated[-1:] * (255 - len(opening.prompt) - len(opening.generated))
        full = Opening(opening.prompt, opening.generated + filler)
        rest = ask(backend, Message(Role.USER, "hello " * 15), opening=full)
        assert planned(rest).n_ctx > 256
        assert cached(rest) >= len(opening.prompt)
        assert planned(rest).prompt_tokens == len(opening.prompt) == finished(rest).stats.prompt_tokens
        assert finished(rest).answer.startswith(finished(first).answer)
        profile_of_256 = replace(profile(tmp_path, *settings), n_ctx=256)
        backend.adopt(profile_of_256)
        with pytest.raises(PromptTooLong, match="256"):
            ask(backend, Message(Role.USER, "hello " * 15), opening=Opening(full.prompt, full.generated * 2))


def test_changed_sampling_and_budgets_keep_the_cache(backend: LocalBackend, tmp_path: Path) -> None:
    ask(backend, STRAWBERRY)
    backend.adopt(profile(tmp_path, "temperature=0.5", "seed=7", "thinking_budget=20", "max_tokens=3"))
    events = ask(backend, STRAWBERRY)
    assert cached(events) == planned(events).prompt_tokens - 1
    assert not any(isinstance(event, Loading) for event in events)
    assert (planned(events).seed, planned(events).thinking_budget) == (7, 20)
    assert finished(events).stats.thinking_tokens == 20
    assert finished(events).reason is FinishReason.MAX_TOKENS


def test_a_larger_context_keeps_the_cache_and_another_kv_type_does_not(
    backend: LocalBackend, tmp_path: Path
) -> None:
    ask(backend, STRAWBERRY)
    backend.adopt(profile(tmp_path, "n_ctx=512", "thinking_budget=100"))
    smaller = ask(backend, STRAWBERRY)
    assert (planned(smaller).n_ctx, cached(smaller)) == (512, planned(smaller).prompt_tokens - 1)
    backend.adopt(profile(tmp_path, "kv_type=q8_0"))
    other = ask(backend, STRAWBERRY)
    assert (planned(other).n_ctx, planned(other).kv_type, cached(other)) == (1024, "q8_0", 0)
    assert not any(isinstance(event, Loading | Notice) for event in other)
    backend.adopt(profile(tmp_path, "kv_type=q8_0", "yarn=2"))
    yarn = ask(backend, STRAWBERRY)
    assert (planned(yarn).yarn_factor, cached(yarn)) == (2, 0)


def test_changed_load_settings_reload_the_weights(backend: LocalBackend, tmp_path: Path) -> None:
    first = ask(backend, STRAWBERRY)
    backend.adopt(profile(tmp_path, "use_mmap=off"))
    again = ask(backend, STRAWBERRY)
    assert isinstance(again[0], Loading)
    assert (cached(again), text(again)) == (0, text(first))


def test_settings_that_fail_leave_the_backend_unchanged(backend: LocalBackend, tmp_path: Path) -> None:
    first = ask(backend, STRAWBERRY)
    with pytest.raises(UsageError, match="threads is 1000"):
        backend.adopt(profile(tmp_path, "threads=1000"))
    assert cached(ask(backend, STRAWBERRY)) > 0
    backend.adopt(profile(tmp_path, "n_ctx=100000"))
    with pytest.raises(UsageError, match="n_ctx 100,000 is past the window"):
        ask(backend, STRAWBERRY)
    backend.adopt(profile(tmp_path))
    after = ask(backend, STRAWBERRY)
    assert (text(after), cached(after)) == (text(first), planned(after).prompt_tokens - 1)
    assert not any(isinstance(event, Loading) for event in after)


def test_an_error_in_a_turn_leaves_no_context_behind_and_the_next_turn_is_answered(
    backend: LocalBackend,
) -> None:
    """The opening has a token that the model does not have, as from an archive of another model."""
    first = ask(backend, STRAWBERRY)
    prompt = opening_of(first).prompt
    with pytest.raises(EngineError):
        ask(backend, STRAWBERRY, opening=Opening((*prompt, 1 << 20), ()))
    assert cached(stopped(backend, 1, STRAWBERRY)) == 0
    with pytest.raises(EngineError):
        ask(backend, STRAWBERRY, opening=Opening((5, 6), (1 << 20,)))
    assert text(ask(backend, STRAWBERRY)) == text(first)


def test_the_identity_is_the_headers_until_the_content_is_hashed(
    miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copy(miniature("Q8_0"), tmp_path / "model.gguf"))
    with closing(LocalBackend(path, profile(tmp_path), 1, AbortFlag())) as backend:
        by_header = backend.identity()
    assert by_header.startswith("header:")
    once = PrefillCache(tmp_path, profile(tmp_path, "kv_store=off"))
    with closing(LocalBackend(path, profile(tmp_path), 1, AbortFlag(), once)) as backend:
        assert backend.identity() == by_header
        once._identities.record(path, "ab" * 32)
        assert backend.identity() == "sha256:" + "ab" * 32
        path.unlink()
        assert backend.identity() == ""


def test_the_second_turn_prefills_only_what_the_first_did_not(
    miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    """The common prefix of two prompts is cached, with and without the store on disk."""
    for min_tokens in (8, 10_000):
        its = profile(tmp_path, f"kv_store_min_tokens={min_tokens}")
        once = PrefillCache(tmp_path / str(min_tokens), its)
        with closing(
            LocalBackend(miniature("Q8_0"), its, 1, AbortFlag(), once, takes_largest=True)
        ) as backend:
            first = ask(backend, STRAWBERRY)
            assert list(backend.keep()) == []
            answer = Message(Role.ASSISTANT, finished(first).answer)
            second = ask(backend, STRAWBERRY, answer, RASPBERRY)
            prompts = [opening_of(events).prompt for events in (first, second)]
            common = next(n for n, (a, b) in enumerate(zip(*prompts, strict=False)) if a != b)
            assert common == len(prompts[0]) - 2
            assert cached(second) == common
