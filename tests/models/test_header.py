"""The GGUF header reader against real files: whole, cut, renamed, patched and fuzzed."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader

from qwq_local.errors import ModelFileError
from qwq_local.models.architecture import check_architecture, model_name
from qwq_local.models.header import read_header, special_token_ids
from tests.command import ROOT, environment


@pytest.fixture(scope="module")
def whole(miniature: Callable[[str], Path]) -> bytes:
    return miniature("Q8_0").read_bytes()


def check(path: Path) -> None:
    check_architecture(read_header(path))


def rejected(path: Path, content: bytes) -> str:
    """The one line that a file with this content is refused with."""
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        check(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def patched(content: bytes, key: str, value: bytes) -> bytes:
    """The file with the scalar under `key` overwritten; the key's own type stays."""
    raw = key.encode()
    at = content.index(struct.pack("<Q", len(raw)) + raw) + 8 + len(raw) + 4
    return content[:at] + value + content[at + len(value) :]


def test_the_header_says_what_the_gguf_package_says(miniature: Callable[[str], Path]) -> None:
    path = miniature("Q8_0")
    header, reader = read_header(path), GGUFReader(path)

    assert {t.name: (tuple(reversed(t.shape)), t.tensor_type.name, t.n_bytes) for t in reader.tensors} == {
        t.name: (t.shape, t.kind.name, t.n_bytes) for t in header.tensors.values()
    }
    for key, field in reader.fields.items():
        if header.scalar(key) is not None:
            assert header.scalar(key) == field.contents()
        elif (length := header.array_length(key)) is not None:
            assert length == len(field.contents())
    types = reader.get_field("tokenizer.ggml.token_type").contents()  # type: ignore[union-attr]
    assert special_token_ids(header) == tuple(i for i, kind in enumerate(types) if kind in (3, 4))


def test_a_file_without_a_type_has_none(whole: bytes, tmp_path: Path) -> None:
    named, unnamed = tmp_path / "named.gguf", tmp_path / "unnamed.gguf"
    named.write_bytes(whole)
    unnamed.write_bytes(whole.replace(b"general.file_type", b"general.file_typo", 1))
    name = model_name(read_header(unnamed))
    assert (name, f"{name} Q8_0") == ("QwQ miniature", model_name(read_header(named)))


def test_a_duplicate_token_is_refused(whole: bytes, tmp_path: Path) -> None:
    """llama.cpp would end the process."""
    one, other = (struct.pack("<Q", 3) + text.encode() for text in ("Ġa", "Ġb"))
    assert one in whole
    assert other in whole
    twice = whole.replace(one, other, 1)
    assert "1 tokens are there twice" in rejected(tmp_path / "twice.gguf", twice)


def test_a_file_that_is_cut_anywhere_is_refused_in_one_line(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    header_end = 40_000
    points = [0, 1, 3, 4, 7, 8, 23, 24, *range(25, header_end, 997), len(whole) // 2, len(whole) - 1]
    for point in points:
        if point == 0:
            path.write_bytes(b"")
            with pytest.raises(ModelFileError):
                check(path)
        else:
            rejected(path, whole[:point])
    assert "cut short" in rejected(path, whole[: len(whole) - 40_000])


def test_another_file_type_is_refused_by_its_first_bytes(tmp_path: Path) -> None:
    assert "not a GGUF" in rejected(tmp_path / "zip.gguf", b"PK\x03\x04" + b"\0" * 100)
    assert "not a GGUF" in rejected(tmp_path / "text.gguf", b"Hello, this is a text file.")
    with pytest.raises(ModelFileError):
        check(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("qwen2.block_count", 0, "block_count is 0"),
        ("qwen2.block_count", 9, "lacks the tensor blk.8"),
        ("qwen2.block_count", 0xFFFFFFFF, "block_count is 4294967295"),
        ("qwen2.embedding_length", 0, "embedding_length is 0"),
        ("qwen2.embedding_length", 128, "should be"),
        ("qwen2.embedding_length", 0xFFFFFFF0, "embedding_length"),
        ("qwen2.feed_forward_length", 511, "should be"),
        ("qwen2.attention.head_count", 0, "head_count is 0"),
        ("qwen2.attention.head_count", 3, "is not 3 heads"),
        ("qwen2.attention.head_count_kv", 2, "should be"),
        ("qwen2.attention.head_count_kv", 3, "do not divide"),
        ("qwen2.context_length", 0, "context_length is 0"),
        ("tokenizer.ggml.eos_token_id", 1 << 30, "eos_token_id"),
    ],
)
def test_absurd_header_values_are_refused(
    whole: bytes, tmp_path: Path, key: str, value: int, says: str
) -> None:
    assert says in rejected(tmp_path / "absurd.gguf", patched(whole, key, struct.pack("<I", value)))


def test_counts_that_the_file_cannot_hold_are_refused_before_anything_is_allocated(
    whole: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "counts.gguf"
    for at in (8, 16):
        for count in (1 << 20, 1 << 40, (1 << 64) - 1):
            assert "do not fit in" in rejected(path, whole[:at] + struct.pack("<Q", count) + whole[at + 8 :])
    long_key = whole[:24] + struct.pack("<Q", 1 << 62) + whole[32:]
    assert "name has" in rejected(path, long_key)
    assert "version" in rejected(path, whole[:4] + struct.pack("<I", 99) + whole[8:])


def test_another_architecture_and_a_missing_tensor_are_named(whole: bytes, tmp_path: Path) -> None:
    other = whole.replace(b"qwen2", b"llama")
    assert "architecture 'llama'; supported: qwen2" in rejected(tmp_path / "other.gguf", other)
    missing = whole.replace(b"blk.3.ffn_up.weight", b"blk.3.ffn_pu.weight")
    assert "lacks the tensor blk.3.ffn_up.weight" in rejected(tmp_path / "missing.gguf", missing)


def test_a_file_that_passes_the_check_never_crashes_llama_cpp(whole: bytes, tmp_path: Path) -> None:
    """400 files with flipped bits in the header: another process loads and uses those that pass."""
    rng = random.Random(1)
    path = tmp_path / "flipped.gguf"
    passed: list[Path] = []
    for number in range(400):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            content[rng.randrange(24, 30_000)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            check(path)
        except ModelFileError:
            continue
        kept = path.with_name(f"flipped-{number}.gguf")
        if len(passed) < 40:
            path.rename(kept)
            passed.append(kept)
    assert passed
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from contextlib import closing
        from qwq_local.engine.api import ContextSettings
        from qwq_local.errors import AbortFlag, QwqError
        from tests.single_sequence import SingleSequence
        from tests.conftest import load
        for name in sys.argv[1:]:
            try:
                with closing(load(Path(name))) as model:
                    with closing(SingleSequence(model, ContextSettings(n_ctx=256))) as context:
                        for _ in context.prefill(model.vocabulary.encode_text("count the r")):
                            pass
            except QwqError as error:
                assert chr(10) not in str(error)
        print("alive")
    """)
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, passed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(tmp_path / "cache"),
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "alive"
