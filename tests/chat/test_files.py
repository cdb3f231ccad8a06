"""Files in a chat: selection, refusals, token counts, and how they are sent with the question."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwq_local.chat import files
from qwq_local.chat.events import Asking, ChatStatus
from qwq_local.chat.files import find_files, split_arguments
from qwq_local.errors import UsageError
from qwq_local.history.archive import Archive
from qwq_local.terminal.sanitizer import cell_width
from tests.queued_backend import Talking, errors, said, says, talking


@pytest.fixture
def archive() -> Iterator[Archive]:
    with Archive.private() as opened:
        yield opened


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with text at several depths, and files that are left out."""
    root = tmp_path / "tree"
    hidden = (".hidden", ".git/config", ".git/.lock", "__pycache__/b.txt", "node_modules/x/y.py")
    for name in ("a.txt", "b.py", "src/c.py", "src/deep/d.py", "src/deep/e.md", *hidden):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"this is {name}\n")
    (root / "src" / "image.bin").write_bytes(b"\x89PNG\0\0")
    (root / "src" / "around").symlink_to(root)
    return root


@pytest.fixture
def talk(archive: Archive, tree: Path) -> Talking:
    return talking(archive, tree)


def names(given_name: str, cwd: Path, limit: int = 100) -> list[str]:
    return [file.name for file in find_files(given_name, cwd, limit).files]


@pytest.mark.parametrize(
    ("given_name", "found"),
    [
        ("a.txt", ["a.txt"]),
        ("*.py", ["b.py"]),
        ("**/*.py", ["b.py", "src/c.py", "src/deep/d.py"]),
        ("src/**", ["src/c.py", "src/deep/d.py", "src/deep/e.md"]),
        ("src/*/?.[xd]y?", []),
        ("src/deep/[de].*", ["src/deep/d.py", "src/deep/e.md"]),
        ("src", ["src/c.py", "src/deep/d.py", "src/deep/e.md"]),
        (".", ["a.txt", "b.py", "src/c.py", "src/deep/d.py", "src/deep/e.md"]),
        (".h*", [".hidden"]),
        (".hidden", [".hidden"]),
        (".git/*", [".git/config"]),
        (".g*/*", [".git/config"]),
        ("src/../a.txt", ["src/../a.txt"]),
    ],
)
def test_paths_folders_and_globs_select_files(tree: Path, given_name: str, found: list[str]) -> None:
    if found:
        assert sorted(names(given_name, tree)) == found
    else:
        with pytest.raises(UsageError, match="no file matches"):
            names(given_name, tree)


def test_globs_find_what_pythons_own_finds(tree: Path) -> None:
    """Python's glob is the oracle, for patterns that match no binary file and no link to a folder."""
    for pattern in ("*", "*.txt", "**/*.md", "src/*.py", "src/**/*.py", "**/deep/*", "*/*.py", "[ab].*"):
        expected = {
            path.relative_to(tree).as_posix()
            for path in tree.glob(pattern)
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(tree).parts)
        }
        expected = {
            name for name in expected if not name.startswith(("src/around", "__pycache__", "node_modules"))
        }
        assert set(names(pattern, tree)) == expected, pattern


def test_an_absolute_path_is_followed(tree: Path) -> None:
    assert names(str(tree / "a.txt"), Path("/")) == [str(tree / "a.txt")]
    assert names(f"{tree}/*.txt", Path("/")) == [str(tree / "a.txt")]


def test_more_files_than_the_limit_are_counted_not_taken(tree: Path) -> None:
    found = find_files(".", tree, 2)
    assert [file.name for file in found.files] == ["a.txt", "b.py"]
    assert found.left_out == (
        "left out: src/image.bin (not text).",
        "left out: 3 more files, there is a limit to how many are taken at once.",
    )


def test_a_huge_folder_is_walked_up_to_a_limit(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(files.MAX_LOOKED_AT + 10):
        (folder / f"{number:06}.txt").touch()
    found = find_files("many", tmp_path, 100)
    assert len(found.files) == 100
    assert found.left_out[-1].startswith("stopped after looking at 20,000 files")


def test_anything_but_a_regular_file_is_refused(tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    with pytest.raises(UsageError, match=r"pipe is no regular file\."):
        find_files("pipe", tree, 10)
    with pytest.raises(UsageError, match="there is no file nothing"):
        find_files("nothing", tree, 10)
    with pytest.raises(UsageError, match="is no file name"):
        find_files("a\0b", tree, 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a b", ["a", "b"]),
        ('"my file.txt" b', ["my file.txt", "b"]),
        ("'a b' \"c'd\"", ["a b", "c'd"]),
        (r"my\ file.txt", ["my file.txt"]),
        (r"C:\dir\file", [r"C:\dir\file"]),
        ('"', ['"']),
        ("  ", []),
        ("""'it'"'"'s mine.txt'""", ["it's mine.txt"]),
        ('"" a', ["a"]),
    ],
)
def test_words_are_split_at_spaces_outside_of_quotes(text: str, words: list[str]) -> None:
    assert split_arguments(text) == words


@given(st.text(alphabet="ab \\\"'*", max_size=12))
def test_any_line_can_be_split(text: str) -> None:
    assert all(split_arguments(text))


def test_attached_files_are_counted_in_tokens_and_precede_the_next_question(
    talk: Talking, archive: Archive
) -> None:
    events = talk.submit("/file a.txt src/c.py")
    assert said(events) == [
        "a.txt     5 tokens",
        "src/c.py  5 tokens",
        "2 files wait for the next question: 10 tokens in front of it.",
        "the prompt has 10 tokens with them and the plan stays: context 1,000, f16 KV.",
    ]
    assert events[-1] == ChatStatus("miniature", 0, 0, 1.0, "not kept", 2)
    events = talk.submit("What is in them?", says())
    assert events[0] == Asking("What is in them?", 1)
    question = talk.backend.questions[-1]
    assert question.messages[-1].content == (
        "```a.txt\nthis is a.txt\n```\n\n```src/c.py\nthis is src/c.py\n```\n\nWhat is in them?"
    )
    assert question.files == ("```a.txt\nthis is a.txt\n```", "```src/c.py\nthis is src/c.py\n```")
    (turn,) = archive.path(1)
    assert (turn.question, turn.files) == ("What is in them?", ("a.txt", "src/c.py"))
    assert talk.lines("/file") == ["no file waits for the next question: /file PATH attaches one."]
    talk.submit("And now?", says())
    assert talk.backend.questions[-1].messages[0].content == turn.content, "a part of its turn for good"


def test_a_file_that_needs_yarn_says_so_before_it_is_sent(talk: Talking, tree: Path) -> None:
    (tree / "long.txt").write_text("word " * 1500)
    assert talk.lines("/file long.txt")[-1] == (
        "the prompt has 1,502 tokens with them. YaRN 2 needed: window 2,000 · context 2,000, now 1,000."
    )


def test_a_file_that_cannot_fit_says_so_and_waits(talk: Talking, tree: Path) -> None:
    (tree / "huge.txt").write_text("word " * 5000)
    lines = talk.lines("/file huge.txt")
    assert lines[-2] == "the prompt has 5,002 tokens; the window holds 4,000."
    assert lines[-1] == "attached: huge.txt (5,002 tok): /file drop NAME takes one back."


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"ab\0c", "x.txt is not text: byte 2 is zero."),
        (b"ab\xff", "x.txt is not UTF-8 text: byte 2 is 0xff."),
    ],
)
def test_a_file_that_is_not_text_is_refused_with_name_and_byte(
    talk: Talking, tree: Path, content: bytes, complaint: str
) -> None:
    (tree / "x.txt").write_bytes(content)
    events = talk.submit("/file x.txt a.txt")
    assert errors(events) == [complaint]
    assert "1 file waits for the next question: 5 tokens in front of it." in said(events), (
        "the other is taken"
    )
    assert errors(talk.submit("See @x.txt", says())) == [complaint]
    assert talk.backend.questions == []


def test_a_broken_file_in_a_folder_is_left_out_and_named(talk: Talking, tree: Path) -> None:
    (tree / "src" / "latin1.txt").write_bytes(b"caf\xe9")
    lines = talk.lines("/file src")
    assert "left out: src/image.bin (not text)." in lines
    assert "left out: src/latin1.txt is not UTF-8 text: byte 3 is 0xe9." in lines
    assert "3 files wait for the next question: 15 tokens in front of it." in lines


def test_a_file_whose_name_is_not_text_is_sent_with_its_folder(
    talk: Talking, tree: Path, archive: Archive
) -> None:
    (tree / "src" / "deep" / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    talk.submit("/file src/deep")
    talk.submit("What is it?", says())
    assert archive.path(1)[0].files[0] == "src/deep/caf\ufffd.txt"


def test_files_are_dropped_by_name_or_all(talk: Talking) -> None:
    talk.submit("/file .")
    assert talk.lines("/file drop *.py")[0] == "taken back: b.py, src/c.py, src/deep/d.py"
    assert talk.lines("/file drop e.md")[0] == "taken back: src/deep/e.md"
    assert errors(talk.submit("/file drop z")) == ["no file z waits; there are a.txt."]
    assert talk.lines("/file drop") == ["taken back: a.txt", "no file waits any more."]
    assert talk.lines("/file drop") == ["no file waits for the next question."]


def test_of_many_attached_files_the_first_are_named_in_full(talk: Talking, tree: Path) -> None:
    for number in range(10, 20):
        (tree / f"{'n' * 30}{number}.txt").write_text("n")
    talk.submit("/file n*.txt")
    (error,) = errors(talk.submit("/file drop z"))
    assert error.endswith(f" {'n' * 30}17.txt and 2 more.")
    assert talk.lines("/file drop")[0].endswith(f" {'n' * 30}17.txt and 2 more")


def test_token_counts_align_after_wide_names(talk: Talking, tree: Path) -> None:
    for name in ("文件.txt", "four.txt"):
        (tree / name).write_text("x")
    wide, narrow = talk.lines("/file 文件.txt four.txt")[:2]
    assert cell_width(wide.partition("tokens")[0]) == cell_width(narrow.partition("tokens")[0])


def test_all_files_together_have_a_limit(talk: Talking, tree: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tree / name).write_bytes(b"x" * (5 << 20))
    assert errors(talk.submit("/file one.txt two.txt")) == [
        "two.txt is left out: with it the files have more than 8 MiB."
    ]
    with (tree / "three.txt").open("wb") as file:
        file.truncate(9 << 20)
    assert errors(talk.submit("/file three.txt")) == [
        "three.txt is larger than 8 MiB: no context holds it. qwq ask --split reads such a file in parts."
    ]


def test_a_new_conversation_has_no_attached_files(talk: Talking) -> None:
    talk.submit("/file a.txt")
    talk.submit("/clear")
    assert talk.lines("/file") == ["no file waits for the next question: /file PATH attaches one."]


def test_at_most_a_hundred_files_are_attached(talk: Talking, tree: Path) -> None:
    for number in range(105):
        (tree / f"n{number}.txt").write_text("x")
    assert "left out: 6 more files, there is a limit to how many are taken at once." in talk.lines(
        "/file *.txt"
    )
    assert errors(talk.submit("/file b.py")) == [
        "b.py is left out: 100 files wait already, /file drop takes them back."
    ]


def test_a_path_with_spaces_needs_no_quotes_when_it_is_alone(talk: Talking, tree: Path) -> None:
    (tree / "my file.txt").write_text("mine")
    for line in ("/file my file.txt", '/file "my file.txt"', r"/file my\ file.txt"):
        assert "my file.txt  " in talk.lines(line)[0]
        talk.submit("/file drop")


@pytest.mark.parametrize(
    ("question", "attached"),
    [
        ("What is in @a.txt?", ["a.txt"]),
        ("@a.txt, @src/c.py: compare", ["a.txt", "src/c.py"]),
        ("(see @b.py)", ["b.py"]),
        ('read @"my file.txt" now', ["my file.txt"]),
        ("two @a.txt and again @a.txt", ["a.txt"]),
        ("line\n@b.py", ["b.py"]),
        ("ask @anna about it", []),
        ("write to me@a.txt", []),
        ("the folder @src stays text", []),
        ("@", []),
    ],
)
def test_an_at_attaches_only_an_existing_file(
    talk: Talking, tree: Path, archive: Archive, question: str, attached: list[str]
) -> None:
    (tree / "my file.txt").write_text("mine")
    talk.submit(question, says())
    (turn,) = archive.path(1)
    assert (turn.question, list(turn.files)) == (question, attached)
    assert turn.content.endswith(question)


def test_a_file_named_in_a_question_is_counted_before_it_is_sent(talk: Talking, tree: Path) -> None:
    (tree / "long.txt").write_text("word " * 1500)
    events = talk.submit("See @long.txt and @a.txt", says())
    assert isinstance(events[0], Asking)
    assert said(events[1:3]) == [
        "long.txt  1,502 tokens",
        "a.txt         5 tokens",
        "the prompt has 1,511 tokens with them. YaRN 2 needed: window 2,000 · context 2,000, now 1,000.",
    ]


def test_a_question_whose_file_does_not_fit_is_shown_above_the_error(talk: Talking, tree: Path) -> None:
    (tree / "long.txt").write_text("word " * 5000)
    events = talk.submit("See @long.txt")
    assert isinstance(events[0], Asking)
    assert events[0].question == "See @long.txt"
    assert errors(events[1:])[0].startswith("the prompt has 5,0")


def test_a_circular_link_is_skipped(talk: Talking, tree: Path) -> None:
    (tree / "loop").symlink_to("loop")
    assert "loop" not in names(".", tree)
    assert "/file loop" in ["/file " + each.text for each in talk.chat.complete("/file lo")]


def test_a_failed_question_keeps_its_files_attached(talk: Talking, tree: Path) -> None:
    talk.submit("/file a.txt")
    talk.submit("word " * 5000)
    assert "1 file waits for the next question: 5 tokens in front of it." in talk.lines("/file")


def test_an_edited_question_keeps_the_files_of_its_turn(talk: Talking, archive: Archive) -> None:
    talk.submit("/file a.txt")
    talk.submit("Waht is @b.py?", says())
    talk.submit("/profile math")
    talk.submit("/edit")
    talk.submit("What are @b.py and @src/c.py?", says())
    (turn,) = archive.path(1)
    assert turn.files == ("a.txt", "b.py", "src/c.py")
    assert turn.content.count("```b.py") == 1
    assert turn.content.startswith("```a.txt\n")
    assert "```\n\nWhat are @b.py and @src/c.py?\n" in turn.content, "with the suffix of now"
    assert "Waht" not in turn.content


def test_a_line_without_a_question_keeps_the_files_attached(talk: Talking) -> None:
    talk.submit("/file a.txt")
    assert talk.lines("") == ["the attached files wait for a question."]
