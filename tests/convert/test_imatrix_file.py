"""Importance matrices as files: both formats read, llama-imatrix's written, merged, damage refused."""

from __future__ import annotations

import base64
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwq_convert.imatrix.file import ImportanceMatrix, merge, read_imatrix, write_imatrix

from qwq_local.errors import ConvertError

UP, QUERY = "blk.0.ffn_up.weight", "blk.0.attn_q.weight"
Entries = tuple[tuple[str, int, tuple[float, ...]], ...]
FIRST: Entries = ((UP, 3, (0.5, 1.5, 3.0, 0.1, 0.7)), (QUERY, 3, (0.25, 9.0, 0.3)))
SECOND: Entries = ((QUERY, 2, (1.1, 0.2, 0.7)),)
# The output of llama-imatrix of llama-cpp-python 0.3.36 for .dat files of 3 chunks of a.txt and 2 of b.txt:
# llama-imatrix -m any.gguf --in-file 1.dat --in-file 2.dat -o merged.gguf
MERGED_BY_LLAMA_IMATRIX = zlib.decompress(
    base64.b64decode(
        "eNpzdw91Y2ZgYGBhgAAYzQOl01PzUosSc/RKKgtSOYB8dqh4Zm5iSVFmhQAqVy8lsSSxOLWkmBMoBlLOBJVnhdKJeiUVJTBOEogj"
        "jGZCckZpXnZ8cn5pXgkLVKMQViXFmVWpYNcC7ZCGmZiTrWegl1hSkhdfqFeempmeUaKXmRdfXJprxAiUZmbABFJ4tIJdUQzSyYik"
        "QwFKo1qalpYXX1qAxVJWJK0OWC1F1Yrd0gQG7ODsGR0XY+PJrkCmC3YVCq4MeEGDM9BdQL0HXM6e8XEyNt7sjCp/wAWfbgB4X1Zn"
    )
)


def legacy(entries: Entries, *end: bytes) -> bytes:
    """A .dat file, number by number; `end` is what follows the entries."""
    content = struct.pack("<i", len(entries))
    for name, n_chunks, values in entries:
        content += struct.pack("<i", len(name)) + name.encode()
        content += struct.pack("<ii", n_chunks, len(values)) + struct.pack(f"<{len(values)}f", *values)
    return content + b"".join(end)


def ending(n_chunks: int, dataset: str) -> bytes:
    return struct.pack("<ii", n_chunks, len(dataset)) + dataset.encode()


def floats(*values: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.array(values, np.float32)


def sample() -> ImportanceMatrix:
    return ImportanceMatrix(
        {UP: floats(1, 2, 0, 4, 3), QUERY: floats(7, 1.1, 0.3)},
        {UP: floats(1024), QUERY: floats(3)},
        ("one.txt", "zwei ü.txt"),
        2,
        512,
    )


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_merged_file_equals_llama_imatrixs_byte_for_byte(tmp_path: Path) -> None:
    one = written(tmp_path / "1.dat", legacy(FIRST, ending(3, "a.txt")))
    two = written(tmp_path / "2.dat", legacy(SECOND, ending(2, "b.txt")))
    out = tmp_path / "merged.gguf"

    write_imatrix(out, merge([read_imatrix(one), read_imatrix(two)]))

    assert out.read_bytes() == MERGED_BY_LLAMA_IMATRIX


def test_gguf_py_reads_a_written_file(tmp_path: Path) -> None:
    path = tmp_path / "made.gguf"
    write_imatrix(path, sample())

    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert {name: value for name, value in keys.items() if not name.startswith("GGUF.")} == {
        "general.type": "imatrix",
        "imatrix.datasets": ["one.txt", "zwei ü.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }
    tensors = {tensor.name: tensor.data.tolist() for tensor in reader.tensors}
    assert tensors == {
        f"{QUERY}.in_sum2": floats(7, 1.1, 0.3).tolist(),
        f"{QUERY}.counts": [3.0],
        f"{UP}.in_sum2": [1.0, 2.0, 0.0, 4.0, 3.0],
        f"{UP}.counts": [1024.0],
    }
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_reads_back_the_same(tmp_path: Path) -> None:
    path = tmp_path / "made.gguf"
    write_imatrix(path, sample())
    again = read_imatrix(path)
    assert (again.datasets, again.chunk_count, again.chunk_size) == (("one.txt", "zwei ü.txt"), 2, 512)
    assert {name: sums.tolist() for name, sums in again.sums.items()} == {
        name: sums.tolist() for name, sums in sample().sums.items()
    }
    assert {name: float(count[0]) for name, count in again.counts.items()} == {UP: 1024.0, QUERY: 3.0}


def test_no_datasets_are_written_as_an_empty_list(tmp_path: Path) -> None:
    path = tmp_path / "made.gguf"
    write_imatrix(path, ImportanceMatrix({UP: floats(1)}, {UP: floats(1)}, (), 0, 512))
    assert read_imatrix(path).datasets == ()


def test_importance_is_sums_over_counts_in_32_bits(tmp_path: Path) -> None:
    """As load_imatrix of llama-quantize: value by value, one division of floats."""
    importance = sample().importance(QUERY)
    assert importance is not None
    assert importance.dtype == np.float32
    assert importance.tolist() == [(np.float32(value) / np.float32(3)).item() for value in (7, 1.1, 0.3)]
    assert sample().importance("blk.9.attn_q.weight") is None


def test_importance_is_one_where_nothing_was_counted() -> None:
    sums, counts = floats(0, 0, 6, 8), floats(0, 2)
    matrix = ImportanceMatrix({UP: sums}, {UP: counts}, (), 1, 512)
    importance = matrix.importance(UP)
    assert importance is not None
    assert importance.tolist() == [1.0, 1.0, 3.0, 4.0]


@pytest.mark.parametrize(("n_chunks", "expected"), [(3, (0.5, 2.0)), (0, (1.5, 6.0))])
def test_importance_of_a_dat_file_is_sums_over_chunks_or_sums(
    tmp_path: Path, n_chunks: int, expected: tuple[float, ...]
) -> None:
    path = written(tmp_path / "1.dat", legacy(((UP, n_chunks, (1.5, 6.0)),), ending(n_chunks, "a.txt")))
    importance = read_imatrix(path).importance(UP)
    assert importance is not None
    assert tuple(importance.tolist()) == expected


@pytest.mark.parametrize(
    ("end", "chunk_count", "datasets"),
    [
        ((), 0, ()),
        ((struct.pack("<i", 7),), 7, ()),
        ((struct.pack("<ii", 7, 0),), 7, ()),
        ((ending(7, "wiki.test.raw"),), 7, ("wiki.test.raw",)),
    ],
)
def test_a_dat_file_may_end_after_its_entries_or_with_chunks_and_text(
    tmp_path: Path, end: tuple[bytes, ...], chunk_count: int, datasets: tuple[str, ...]
) -> None:
    matrix = read_imatrix(written(tmp_path / "1.dat", legacy(FIRST, *end)))
    assert (matrix.chunk_count, matrix.datasets, matrix.chunk_size) == (chunk_count, datasets, 0)
    assert matrix.sums[QUERY].tolist() == floats(0.25, 9.0, 0.3).tolist()
    assert matrix.counts[QUERY].tolist() == [3.0]


def test_merging_adds_sums_and_counts_and_lists_all_texts() -> None:
    merged = merge([sample(), sample()])
    assert merged.sums[UP].tolist() == [2.0, 4.0, 0.0, 8.0, 6.0]
    assert {name: float(count[0]) for name, count in merged.counts.items()} == {UP: 2048.0, QUERY: 6.0}
    assert (merged.chunk_count, merged.chunk_size) == (4, 512)
    assert merged.datasets == sample().datasets * 2
    assert sample().sums[UP].tolist() == [1.0, 2.0, 0.0, 4.0, 3.0]


def test_merging_counts_in_chunks_of_the_size_asked_for() -> None:
    assert merge([sample()], 128).chunk_count == 8


def test_matrices_of_different_models_are_not_merged() -> None:
    other = ImportanceMatrix({UP: floats(1, 2)}, {UP: floats(512)}, (), 1, 512)
    with pytest.raises(ConvertError, match=f"{UP}' has 5 columns in one importance matrix and 2 in another"):
        merge([sample(), other])


def _gguf_without(key: str) -> Callable[[bytes], bytes]:
    """Renames a key to one of the same length, so that nothing else moves."""
    return lambda content: content.replace(key.encode(), key[::-1].encode())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: b"", "is empty"),
        (lambda content: content[:-30], "cut short"),
        (_gguf_without("imatrix.chunk_count"), r"imatrix\.chunk_count is None"),
        (_gguf_without("imatrix.datasets"), r"imatrix\.datasets is missing"),
        (lambda content: content.replace(b"attn_q.weight.counts", b"attn_q.weight.kounts"), "not both"),
        (lambda content: content.replace(floats(7).tobytes(), floats(np.nan).tobytes()), "nan at column 0"),
        (lambda content: content.replace(floats(1.1).tobytes(), floats(-1).tobytes()), "-1.0 at column 1"),
        (
            lambda content: content.replace(b"\7\0\0\0\0\0\0\0imatrix", b"\7\0\0\0\0\0\0\0adapter"),
            "'adapter'",
        ),
    ],
)
def test_a_gguf_that_is_not_a_whole_importance_matrix_is_refused_with_the_reason(
    tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    path = tmp_path / "made.gguf"
    write_imatrix(path, sample())
    sound = path.read_bytes()
    path.write_bytes(damage(sound))
    assert path.read_bytes() != sound
    with pytest.raises(ConvertError, match=reason) as caught:
        read_imatrix(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"Once upon a time there was a text that is no importance matrix.", "no number of entries"),
        (legacy(()), "0 entries"),
        (legacy(FIRST)[:-3], "ends at byte 95"),
        (legacy(FIRST, ending(3, "a.txt"))[:-1], "ends at byte"),
        (legacy(FIRST, ending(3, "a.txt"), b"!"), "1 bytes follow"),
        (legacy(((UP, 1, ()),)), "0 values"),
        (legacy(((UP, -1, (1.0,)),)), "-1 chunks"),
        (legacy(((UP, 1, (np.inf,)),)), "inf at column 0"),
        (legacy(FIRST + FIRST), "twice"),
        (struct.pack("<ii", 1, 2**31 - 1) + bytes(100), "no number of letters"),
    ],
)
def test_a_broken_dat_file_is_refused_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(ConvertError, match=reason):
        read_imatrix(written(tmp_path / "1.dat", content))


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ConvertError, match="cannot be read"):
            read_imatrix(path)
    with pytest.raises(ConvertError, match="cannot be written"):
        write_imatrix(tmp_path / "nowhere" / "x.gguf", sample())


Mutation = tuple[int, int, int]
MUTATIONS = st.lists(
    st.tuples(st.integers(0, 2**16), st.sampled_from((1, 2, 4, 8)), st.integers(0, 2**64 - 1)), max_size=4
)


@settings(max_examples=400)
@given(is_gguf=st.booleans(), cut=st.none() | st.integers(0, 2**16), mutations=MUTATIONS)
def test_a_damaged_file_is_read_or_refused_within_bounded_memory(
    tmp_path_factory: pytest.TempPathFactory, is_gguf: bool, cut: int | None, mutations: list[Mutation]
) -> None:
    content = bytearray(MERGED_BY_LLAMA_IMATRIX if is_gguf else legacy(FIRST, ending(3, "a.txt")))
    for place, width, value in mutations:
        at = place % len(content)
        content[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[: None if cut is None else cut % len(content)])

    complaint = ""
    tracemalloc.start()
    try:
        matrix = read_imatrix(path)
        assert all(np.isfinite(sums).all() for sums in matrix.sums.values())
    except ConvertError as error:
        complaint = str(error)
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert "\n" not in complaint
    assert peak_bytes < 2**19
