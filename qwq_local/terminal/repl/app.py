"""The chat on a terminal: one prompt_toolkit application from the first prompt to the last.

The main thread draws and reads keys. The Talk runs in its own thread; its events are drawn at most twenty
times a second, less often where drawing is slow. Nothing is drawn while nothing happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, TypeVar

from prompt_toolkit.application import Application
from prompt_toolkit.application.current import set_app
from prompt_toolkit.key_binding.key_processor import KeyProcessor
from prompt_toolkit.output import ColorDepth

from qwq_local.chat.events import Copy, Edit, Leave, Page, Said, Talk, ThinkView
from qwq_local.errors import QwqError
from qwq_local.terminal.layout import Row
from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import Clock
from qwq_local.terminal.repl.fullscreen import Fullscreen, copy
from qwq_local.terminal.repl.input_line import STYLE, InputLine
from qwq_local.terminal.repl.key_bindings import ESCAPE_S, KeyActions, bindings, waits_s
from qwq_local.terminal.repl.paste import Pastes, TerminalInput
from qwq_local.terminal.repl.queue import EntryQueue, LineEnded, TalkFailed, TalkThread
from qwq_local.terminal.repl.renderer import BottomArea, InlineRenderer, QuietOutput
from qwq_local.terminal.repl.turn_view import TurnView

T = TypeVar("T")

FRAME_S = 0.05
"""Seconds between two frames, at least."""

IDLE_SHARE = 20
"""The next frame waits this many times as long as the last one took: drawing takes 5 % of a core at most."""

SLOWEST_FRAME_S = 0.5
TICK_S = 0.25
"""While something runs, the status line is redrawn this often without any event."""

DRAIN_S = 0.03
"""Seconds for which events are handled before keys are read again."""

_ENDS = (signal.SIGTERM, signal.SIGHUP)

LEAVE_WITHIN_S = 10.0
"""Seconds that a stopped turn may take to end; then the chat ends without it."""


@dataclass(frozen=True, slots=True)
class ReplOptions:
    """Where a chat runs. With `history` None, entries are kept in memory only."""

    output: Output
    stdin: TextIO
    environ: Mapping[str, str]
    clock: Clock
    history: Path | None
    view: ThinkView = ThinkView.TAIL


class Repl:
    """A chat on a terminal. `run` returns when the user has left."""

    def __init__(self, talk: Talk, options: ReplOptions) -> None:
        self._talk = talk
        self._clock = options.clock
        self._output = options.output
        self._environ = options.environ
        self._status: int | None = None
        self._has_news = self._is_paused = self._is_cut_off = False
        self._view = TurnView(options.output, options.clock, options.view)
        self._pastes = Pastes()
        self._bottom = BottomArea(options.output, options.clock, self._waiting_rows, self._hint_changed)
        self._thread = TalkThread(talk, self._wake)
        self._queue = EntryQueue(self._thread, self._view, self._pastes, self._bottom)
        self._line = InputLine(options.output, self._pastes, options.history, talk.complete)
        self._actions = KeyActions(
            self._line, self._queue, self._view, self._bottom, options.clock, self.leave, self.edit_input
        )
        source = TerminalInput(options.stdin)
        self._quiet = QuietOutput(options.output, options.environ.get("TERM", ""))
        self._fullscreen = Fullscreen(options.output, options.environ, source, self._quiet)
        self._app: Application[int] = Application(
            layout=self._line.layout,
            key_bindings=bindings(self._actions),
            color_depth=None if options.output.has_color else ColorDepth.DEPTH_1_BIT,
            style=STYLE,
            include_default_pygments_style=False,
            erase_when_done=True,
            terminal_size_polling_interval=None,
            input=source,
            output=self._quiet,
        )
        self._app.ttimeoutlen = ESCAPE_S
        self._app.key_processor.after_key_press += self._wait_for_rest
        style = self._app.renderer.style
        self._renderer = InlineRenderer(style, self._quiet, options.output, self._bottom, self._take_frame)
        self._app.renderer = self._renderer

    def run(self) -> int:
        """Chat until the user leaves. Returns 0, or 128 plus the number of the signal that ended it.

        After such a signal, or when the terminal is gone, further signals are ignored. Closes the Talk.
        Raises what the Talk raises, after the terminal is restored.
        """
        try:
            return asyncio.run(self._run())
        finally:
            self._queue.leave()
            self._thread.finish()
            self._talk.close()
            for number in () if self._is_cut_off else _ENDS:
                signal.signal(number, signal.SIG_DFL)

    # What keys need.

    def leave(self, status: int) -> None:
        """End the chat when the running turn has ended; at once if none runs, or at the second call."""
        is_second, self._status = self._status is not None, status
        self._fullscreen.end()
        self._queue.leave()
        if is_second or not self._queue.is_busy:
            self._exit()
        else:
            self._bottom.hint("leaving …", LEAVE_WITHIN_S)
            self._loop.call_later(LEAVE_WITHIN_S, self._exit)

    def edit_input(self) -> None:
        """Open the editor with the text of the input line."""
        if not self._fullscreen.is_open:
            self._app.create_background_task(self._edit_input())

    # The loop.

    async def _run(self) -> int:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._on_error)
        self._woken = asyncio.Event()
        pump = self._loop.create_task(self._pump())
        try:
            with self._signals():
                self._queue.is_busy = True
                self._thread.begin()
                return await self._app.run_async(handle_sigint=False, set_exception_handler=False)
        except EOFError:
            self._is_cut_off = True
            return self._status or 0  # the terminal is gone
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
            self._write_last()

    async def _pump(self) -> None:
        """Handle new events, and draw."""
        try:
            while True:
                is_running = self._queue.is_busy or self._has_news
                with contextlib.suppress(TimeoutError):
                    # wait_for would swallow a cancellation that comes together with the event.
                    async with asyncio.timeout(TICK_S if is_running else None):
                        await self._woken.wait()
                self._woken.clear()
                self._thread.is_awake = False
                self._has_news = self._drain()
                if self._thread.events and not self._fullscreen.is_open:
                    self._woken.set()
                started = self._clock()
                self._draw()
                took = self._clock() - started
                await asyncio.sleep(min(SLOWEST_FRAME_S, max(FRAME_S, IDLE_SHARE * took)))
        except Exception as error:
            self._fail(error)

    def _drain(self) -> bool:
        """Handle events as far as there is time. Returns whether there were any."""
        events = self._thread.events
        until = self._clock() + DRAIN_S
        has_news = bool(events)
        while events and self._clock() < until and not self._is_paused:
            if self._fullscreen.is_open and isinstance(events[0], Page | Edit):
                break
            self._take(events.popleft())
        if self._line.is_steering and not self._view.is_thinking:
            self._actions.end_steering()
            self._bottom.hint("the thought ended")
        return has_news

    def _take(self, event: Any) -> None:
        match event:
            case LineEnded():
                self._queue.end_line()
                if self._status is not None:
                    self._exit()
            case TalkFailed(error):
                raise error
            case Page():
                self._fullscreen.is_open = True
                self._app.create_background_task(self._away(self._fullscreen.read(self._app, event)))
            case Copy(text, what):
                self._is_paused = True  # later events wait for the result
                self._app.create_background_task(self._copy(text, what))
            case Edit(text):
                self._is_paused = True
                self._app.create_background_task(self._edit(text))
            case Leave():
                self.leave(0)
            case _:
                self._queue.show(event)

    def _waiting_rows(self, columns: int) -> list[Row]:
        return self._queue.rows(columns, self._output.has_color)

    def _take_frame(self) -> Sequence[Row]:
        frame = self._view.frame()
        self._bottom.live, self._bottom.status = frame.live, frame.status
        return frame.final

    def _draw(self) -> None:
        if not self._app.is_running or self._fullscreen.is_open:
            return
        if self._renderer.is_ready:
            self._renderer.draw(self._take_frame())
        else:
            self._app.invalidate()

    def _wake(self) -> None:
        """Wake the drawing task, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._woken.set)

    def _wait_for_rest(self, keys: KeyProcessor) -> None:
        self._app.timeoutlen = waits_s(keys.key_buffer)

    def _hint_changed(self, seconds: float) -> None:
        self._app.invalidate()
        if seconds < LEAVE_WITHIN_S:
            self._loop.call_later(seconds + 0.01, self._app.invalidate)

    # Background tasks.

    async def _away(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for the program that has the terminal, then draw the events since."""
        try:
            return await work
        finally:
            self._wake()

    async def _copy(self, text: str, what: str) -> None:
        try:
            copied = await self._loop.run_in_executor(None, copy, text, what, self._environ)
            self._quiet.send(copied.sequence)
        finally:
            self._is_paused = False
        self._say(copied.line, copied.is_error)

    async def _edit_input(self) -> None:
        try:
            text = await self._away(self._fullscreen.edit(self._app, self._pastes.expand(self._line.text)))
            if text is not None:
                self._line.put(self._pastes.take_in(text, 0))
        except QwqError as error:
            self._say(str(error), True)

    async def _edit(self, text: str) -> None:
        edited = ""
        try:
            saved = await self._away(self._fullscreen.edit(self._app, text))
            edited = saved or ""
            if not edited.strip():
                self._say("nothing was sent.")
        except QwqError as error:
            self._say(str(error), True)
        finally:
            self._is_paused = False
            self._queue.enter_edited(self._pastes.take_in(edited, 0))

    def _say(self, line: str, is_error: bool = False) -> None:
        self._view.show(Said((line,), is_error))
        self._wake()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Handle SIGINT as Ctrl-C; leave at SIGTERM and SIGHUP."""
        self._loop.add_signal_handler(signal.SIGINT, self._interrupted)
        for number in _ENDS:
            signal.signal(number, self._asked_to_end)
        try:
            yield
        finally:
            self._loop.remove_signal_handler(signal.SIGINT)
            for number in _ENDS:
                # A closing window sends several signals: none may end the process while it writes the turn.
                signal.signal(number, signal.SIG_IGN)

    def _asked_to_end(self, number: int, _frame: FrameType | None) -> None:
        self._is_cut_off = True
        self._loop.call_soon_threadsafe(self.leave, 128 + number)

    def _interrupted(self) -> None:
        if self._fullscreen.is_open:
            self._fullscreen.interrupt()
        else:
            with set_app(self._app):
                self._actions.interrupt()
            self._app.invalidate()

    def _exit(self) -> None:
        if self._app.is_running and not self._app.is_done:
            self._app.exit(result=self._status or 0)

    def _on_error(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception):
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """End the chat with an error that is a bug."""
        self._fullscreen.end()
        if self._app.is_running and not self._app.is_done:
            self._app.exit(exception=error)

    def _write_last(self) -> None:
        """Write the last events, below which there is no input line any more."""
        while self._thread.events:
            event = self._thread.events.popleft()
            if not isinstance(event, LineEnded | TalkFailed | Page | Copy | Edit | Leave):
                self._view.show(event)
        self._view.end_line()
        with contextlib.suppress(OSError):
            self._output.write("".join(f"{row.written}\n" for row in self._view.frame().final))
