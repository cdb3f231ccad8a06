"""Several texts as one that can be cut, and what a part of it is in terms of those texts.

Attachments and standard input go in; one text comes out, and for a span of it the excerpts again, each under
its file's name with its lines. Knows no tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwq_local.dialogue.conversation import Attachment, one_line
from qwq_local.dialogue.splitting import Part

_BETWEEN = "\n```\n\n"


@dataclass(frozen=True, slots=True)
class Excerpt:
    """What one part holds: whole files and pieces of files, and of standard input."""

    attachments: tuple[Attachment, ...]
    stdin_text: str

    @property
    def length(self) -> int:
        """Characters of text."""
        return sum(len(each.text) for each in self.attachments) + len(self.stdin_text)


@dataclass(frozen=True, slots=True)
class _Source:
    """One text and where its body is in the joined one; no name: standard input."""

    name: str
    start: int
    end: int


class Sources:
    """Files, then standard input, as one text. Each file stands under its name, as it will in a prompt."""

    def __init__(self, attachments: Sequence[Attachment], stdin_text: str) -> None:
        pieces: list[str] = []
        self._sources: list[_Source] = []
        length = 0
        for name, text in [*((each.name, each.text) for each in attachments), ("", stdin_text)]:
            if not text:
                continue
            # As it will stand in a prompt, so that measuring the joined text counts the fences.
            head = f"{_BETWEEN}```{one_line(name)}\n" if name else _BETWEEN
            pieces += [head, text]
            self._sources.append(_Source(name, length + len(head), length + len(head) + len(text)))
            length += len(head) + len(text)
        self.text = "".join(pieces)

    @property
    def longest_name(self) -> str:
        """What the longest name looks like above an excerpt."""
        name = max((source.name for source in self._sources), key=len, default="")
        return _in_part(name, 1_000_000, 9_999_999)

    def excerpts(self, parts: Sequence[Part]) -> Iterator[Excerpt]:
        """What each part holds; parts are in order, and a part that holds only a name is left out."""
        lines = _Lines(self.text)
        first = 0
        for part in parts:
            while first < len(self._sources) - 1 and self._sources[first].end <= part.start:
                first += 1
            if excerpt := self._excerpt(part, first, lines):
                yield excerpt

    def _excerpt(self, part: Part, first: int, lines: _Lines) -> Excerpt | None:
        attachments: list[Attachment] = []
        stdin_text = ""
        for source in self._sources[first:]:
            if source.start >= part.end:
                break
            start, end = max(part.start, source.start), min(part.end, source.end)
            body = self.text[start:end]
            if not source.name:
                stdin_text = body
            elif body.strip() and (start, end) == (source.start, source.end):
                attachments.append(Attachment(source.name, body))
            elif body.strip():
                begins = lines.between(source.start, start) + 1
                ends = begins + body.rstrip("\n").count("\n")
                attachments.append(Attachment(_in_part(source.name, begins, ends), body))
        return Excerpt(tuple(attachments), stdin_text) if attachments or stdin_text.strip() else None


class _Lines:
    """Counts lines from a place to one after it; linear while neither place goes back."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._from = self._to = self._count = 0

    def between(self, start: int, end: int) -> int:
        if start != self._from or end < self._to:
            self._from, self._to, self._count = start, start, 0
        self._count += self._text.count("\n", self._to, end)
        self._to = end
        return self._count


def _in_part(name: str, first: int, last: int) -> str:
    return f"{name}, line {first:,}" if first == last else f"{name}, lines {first:,} to {last:,}"
