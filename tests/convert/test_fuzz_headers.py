"""Hostile headers: any content of a GGUF or safetensors file is read or refused in one line.

There are 3,400 files: cut, overwritten, and built from arbitrary parts. None may raise anything but a
ConvertError or ModelFileError, take long, or allocate more than a multiple of the file's size.
"""

from __future__ import annotations

import json
import signal
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qwq_convert.checkpoint import INDEX, CheckpointFolder
from qwq_convert.gguf_file import GgufHeader, read_parts
from qwq_convert.pipeline import run_conversion
from qwq_convert.plan import ConvertRequest
from qwq_convert.safetensors import Shard
from qwq_convert.verification import surplus_bytes, verify_blocks, verify_placement

from qwq_local.errors import ConvertError, ModelFileError
from qwq_local.models.architecture import check_architecture, check_completeness, model_name, notices
from qwq_local.models.header import header_of, special_token_ids
from tests.checkpoints import CheckpointSpec, write_checkpoint

# Twice what Python needs for the densest known content (DENSEST, below): {"":0} takes 7 bytes in a
# file and 30 times as many as an object, [] and 16-bit numbers 25 times as many.
BYTES_PER_BYTE = 64
BYTES_AT_LEAST = 2**16
LONGEST_MESSAGE = 1000
# Processor time of a whole test, twenty times the usual: only an endless loop, or one that squares the
# size, comes near.
MOST_CPU_S = 120


# A case that fails is printed whole, with all its names.
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")


def thorough(max_examples: int) -> settings:
    """Settings for this number of cases; `ends` limits their total processor time."""
    return settings(
        max_examples=max_examples,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """Fails a test that uses too much processor time; other processes do not count."""

    def fail(_signal: int, _frame: object) -> None:
        raise AssertionError(f"no end after {MOST_CPU_S} seconds of processor time")

    earlier = signal.signal(signal.SIGVTALRM, fail)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, earlier)


class Samples:
    """Sound files to damage, and a path for the damaged ones. It is no dataclass, since those print whole."""

    def __init__(self, folder: Path) -> None:
        spec = CheckpointSpec(hidden_size=32, n_heads=2, n_kv_heads=2, intermediate_size=32, n_layers=1)
        source = write_checkpoint(folder / "model", spec)
        path = folder / "model.gguf"
        run_conversion(ConvertRequest(source, "Q8_0", path))
        header = read_parts(path)[0]
        self.folder = folder
        self.gguf = path.read_bytes()
        self.gguf_header = header.data_start
        self.fields = {key.encode(): whole_value(header, key) for key in header.keys}
        self.entries = [
            entry(t.name.encode(), [*reversed(t.shape)], t.kind, t.offset) for t in header.tensors
        ]
        self.shard = (source / "model.safetensors").read_bytes()
        self.shard_header = 8 + int.from_bytes(self.shard[:8], "little")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return Samples(tmp_path_factory.mktemp("fuzz"))


def whole_value(header: GgufHeader, key: str) -> bytes:
    """Type and value of a key-value as the file has them."""
    kind, content = header.encoded(key)
    item = header.kinds(key)[1]
    counted = b"" if item is None else struct.pack("<IQ", item, header.array_length(key) or 0)
    return struct.pack("<I", kind) + counted + content


def lengthy(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def entry(name: bytes, sizes: list[int], kind: int, offset: int) -> bytes:
    """The header's entry of a tensor."""
    return lengthy(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind & 0xFFFFFFFF, offset)


def read_gguf(path: Path) -> None:
    """Read the header of a GGUF in every way that the program does, and its blocks."""
    parts = read_parts(path)
    for key in parts[0].keys:
        parts[0].value(key)
    header = header_of(parts)
    special_token_ids(header)
    model_name(header)
    for part in parts:
        verify_placement(part)
        surplus_bytes(part)
    for _ in verify_blocks(parts, threads=1):
        pass
    check_architecture(header)
    check_completeness(header)
    list(notices(header))


def read_shard(path: Path) -> None:
    with Shard(path) as shard:
        for tensor in shard.tensors:
            shard.read(tensor.n_bytes, tensor.offset)


def outcome(read: Callable[[Path], None], path: Path) -> str:
    """The one line of the refusal, empty if the file is read. Asserts the bound of memory."""
    bound = BYTES_PER_BYTE * path.stat().st_size + BYTES_AT_LEAST
    message = ""
    tracemalloc.start()
    try:
        read(path)
    except (ConvertError, ModelFileError) as error:
        message = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak <= bound, f"{peak:,} bytes for a file of {path.stat().st_size:,}"
    assert "\n" not in message
    assert len(message.replace(str(path.parent), "")) <= LONGEST_MESSAGE
    return message


def attempt(read: Callable[[Path], None], path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return outcome(read, path)


# Damage to a sound file: a position and what to do there.

WILD_NUMBERS = st.sampled_from(
    [
        0,
        1,
        2,
        3,
        7,
        8,
        9,
        12,
        13,
        255,
        2**15,
        2**16,
        2**31 - 1,
        2**31,
        2**32 - 1,
        2**40,
        2**62,
        2**63,
        2**64 - 1,
    ]
)
DAMAGE = st.one_of(
    st.integers(0, 7).map(lambda bit: ("flip", bytes([1 << bit]))),
    WILD_NUMBERS.map(lambda number: ("put", struct.pack("<Q", number))),
    WILD_NUMBERS.map(lambda number: ("put", struct.pack("<I", number & 0xFFFFFFFF))),
    st.binary(min_size=1, max_size=6).map(lambda content: ("put", content)),
    st.binary(min_size=1, max_size=24).map(lambda content: ("insert", content)),
    st.integers(1, 64).map(lambda count: ("remove", bytes(count))),
    st.integers(8, 96).map(lambda count: ("repeat", bytes(count))),
)
PLACES = st.integers(0, 2**32)


def damaged(content: bytes, place: int, how: str, value: bytes) -> bytes:
    before, after = content[:place], content[place:]
    if how == "flip":
        return before + bytes([content[place] ^ value[0]]) + after[1:]
    if how == "put":
        return before + value + after[len(value) :]
    if how == "insert":
        return before + value + after
    if how == "remove":
        return before + after[len(value) :]
    return before + after[: len(value)] + after


def damage_all(content: bytes, header: int, damages: list[tuple[int, tuple[str, bytes]]]) -> bytes:
    for place, (how, value) in damages:
        content = damaged(content, place % header, how, value)
    return content


@thorough(600)
@given(damages=st.lists(st.tuples(PLACES, DAMAGE), min_size=1, max_size=3))
def test_a_gguf_damaged_anywhere_is_read_or_refused(
    samples: Samples, damages: list[tuple[int, tuple[str, bytes]]]
) -> None:
    content = damage_all(samples.gguf, samples.gguf_header, damages)
    attempt(read_gguf, samples.folder / "damaged.gguf", content)


@thorough(400)
@given(length=PLACES)
def test_a_gguf_cut_anywhere_is_refused(samples: Samples, length: int) -> None:
    """Mostly within the header, where less follows than a length says."""
    length %= samples.gguf_header if length % 8 else len(samples.gguf) - 32
    assert attempt(read_gguf, samples.folder / "cut.gguf", samples.gguf[:length])


@thorough(400)
@given(damages=st.lists(st.tuples(PLACES, DAMAGE), min_size=1, max_size=3))
def test_a_safetensors_file_damaged_anywhere_is_read_or_refused(
    samples: Samples, damages: list[tuple[int, tuple[str, bytes]]]
) -> None:
    content = damage_all(samples.shard, samples.shard_header, damages)
    attempt(read_shard, samples.folder / "damaged.safetensors", content)


@thorough(200)
@given(length=PLACES)
def test_a_safetensors_file_cut_anywhere_is_refused(samples: Samples, length: int) -> None:
    length %= samples.shard_header if length % 4 else len(samples.shard)
    assert attempt(read_shard, samples.folder / "cut.safetensors", samples.shard[:length])


# GGUF headers from parts of which most are right by themselves.

ARCHITECTURE_KEYS = (
    b"general.architecture",
    b"general.alignment",
    b"general.type",
    b"general.name",
    b"general.file_type",
    b"split.count",
    b"split.no",
    b"split.tensors.count",
    b"qwen2.block_count",
    b"qwen2.embedding_length",
    b"qwen2.feed_forward_length",
    b"qwen2.attention.head_count",
    b"qwen2.attention.head_count_kv",
    b"qwen2.context_length",
    b"qwen2.rope.freq_base",
    b"qwen2.attention.layer_norm_rms_epsilon",
    b"qwen2.rope.scaling.type",
    b"tokenizer.ggml.model",
    b"tokenizer.ggml.pre",
    b"tokenizer.ggml.tokens",
    b"tokenizer.ggml.token_type",
    b"tokenizer.ggml.merges",
    b"tokenizer.ggml.eos_token_id",
    b"tokenizer.chat_template",
)
SIZES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
LENGTHS = st.one_of(st.integers(0, 6), WILD_NUMBERS)


names = st.one_of(
    st.sampled_from(ARCHITECTURE_KEYS),
    st.sampled_from((b"token_embd.weight", b"output_norm.weight", b"blk.0.attn_q.weight", b"output.weight")),
    st.binary(max_size=4),
    st.sampled_from((b"a" * 63, b"a" * 64, b"k" * 65535, b"k" * 65536, b"\xff", b"a\0b", b"line\nline")),
)
texts = st.one_of(
    names.map(lengthy),
    st.sampled_from((b"qwen2", b"gpt2", b"model\nline", b"x" * 3000, b"\xed\xa0\x80")).map(lengthy),
    st.builds(lengthy, st.binary(max_size=8), LENGTHS),
)
scalars = st.one_of(
    texts.map(lambda content: (8, content)),
    st.tuples(st.sampled_from(sorted(SIZES)), st.binary(min_size=8, max_size=8)).map(
        lambda drawn: (drawn[0], drawn[1][: struct.calcsize(SIZES[drawn[0]])])
    ),
    WILD_NUMBERS.map(lambda number: (4, struct.pack("<I", number & 0xFFFFFFFF))),
    WILD_NUMBERS.map(lambda number: (10, struct.pack("<Q", number))),
)


@st.composite
def arrays(draw: st.DrawFn, depth: int = 3) -> tuple[int, bytes]:
    """An array of scalars or arrays whose count is right or arbitrary."""
    if depth and draw(st.integers(0, 3)) == 0:
        items: list[tuple[int, bytes]] = draw(st.lists(arrays(depth - 1), max_size=3))
        kind = 9
    else:
        first = draw(scalars)
        kind, items = first[0], [first] * draw(st.integers(0, 5))
    count = draw(st.one_of(st.just(len(items)), st.just(len(items)), LENGTHS))
    return 9, struct.pack("<IQ", kind, count) + b"".join(content for _, content in items)


values = st.one_of(scalars, arrays(), st.tuples(st.integers(0, 20), st.binary(max_size=16))).map(
    lambda drawn: struct.pack("<I", drawn[0]) + drawn[1]
)
fields = st.builds(lambda name, value: lengthy(name) + value, names, values)
dimensions = st.lists(st.one_of(st.sampled_from((1, 32, 64, 256)), WILD_NUMBERS), max_size=5)
entries = st.builds(
    entry,
    names,
    dimensions,
    st.one_of(st.integers(0, 43), WILD_NUMBERS),
    st.one_of(st.sampled_from((0, 32, 64, 96, 128, 1024)), WILD_NUMBERS),
)


@st.composite
def gguf_files(draw: st.DrawFn) -> bytes:
    own_fields, own_entries = draw(st.lists(fields, max_size=6)), draw(st.lists(entries, max_size=4))
    if own_fields and draw(st.integers(0, 1)) == 1:
        own_fields.append(own_fields[0])
    if own_entries and draw(st.integers(0, 3)) == 0:
        own_entries.append(own_entries[0])
    counts = [len(own_entries), len(own_fields)]
    if draw(st.integers(0, 9)) == 0:
        counts[draw(st.integers(0, 1))] = draw(WILD_NUMBERS)
    head = b"GGUF" + struct.pack("<IQQ", 3, *counts)
    padding = bytes(draw(st.sampled_from((0, 31, 1024, 4096))))
    return head + b"".join(own_fields) + b"".join(own_entries) + padding


@thorough(600)
@given(content=gguf_files())
def test_a_gguf_of_wild_parts_is_read_or_refused(samples: Samples, content: bytes) -> None:
    """Nested arrays, names that repeat or are too long, any counts and lengths, overlapping tensors."""
    attempt(read_gguf, samples.folder / "wild-00001-of-00003.gguf", content)


@thorough(500)
@given(
    changes=st.lists(st.tuples(st.sampled_from(ARCHITECTURE_KEYS), st.one_of(values, st.none())), max_size=3),
    replaced=st.lists(st.tuples(PLACES, entries), max_size=1),
)
def test_a_whole_model_with_a_few_wild_values_is_read_or_refused(
    samples: Samples, changes: list[tuple[bytes, bytes | None]], replaced: list[tuple[int, bytes]]
) -> None:
    """Only the values of the header are wrong, so the checks after the reader run."""
    wanted = dict(samples.fields)
    for key, value in changes:
        wanted.pop(key, None)
        if value is not None:
            wanted[key] = value
    own_entries = list(samples.entries)
    for place, wild in replaced:
        own_entries[place % len(own_entries)] = wild
    header = b"GGUF" + struct.pack("<IQQ", 3, len(own_entries), len(wanted))
    header += b"".join(lengthy(key) + value for key, value in wanted.items()) + b"".join(own_entries)
    content = header.ljust(-(-len(header) // 32) * 32, b"\0") + samples.gguf[samples.gguf_header :]
    attempt(read_gguf, samples.folder / "model-00001-of-00003.gguf", content)


# safetensors headers as text, because Python's json would not write most of the wrong ones.

json_scalars = st.one_of(
    st.sampled_from(
        ('""', '"F32"', '"BF16"', '"F8_E4M3"', "null", "true", "NaN", "-Infinity", '"\\ud800"', '"\\n"')
    ),
    WILD_NUMBERS.map(str),
    st.sampled_from(
        ("-1", "1e400", "1.5", "0" * 40, "9" * 4000, "9" * 5000, "[" * 2000, "[" * 900 + "]" * 900)
    ),
    st.text(max_size=4).map(json.dumps),
)
json_keys = st.one_of(
    st.sampled_from(('"a"', '"b"', '"__metadata__"', '"dtype"', '"shape"', '"data_offsets"', '"a\\nb"')),
    st.sampled_from((json.dumps("long" * 500), '"\\ud800"')),
)


def json_object(pairs: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"


json_values = st.recursive(
    json_scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: "[" + ",".join(items) + "]"),
        st.lists(st.tuples(json_keys, inner), max_size=4).map(json_object),
    ),
    max_leaves=8,
)
json_entries = st.builds(
    lambda dtype, shape, offsets: json_object(
        [('"dtype"', dtype), ('"shape"', shape), ('"data_offsets"', offsets)]
    ),
    st.one_of(st.sampled_from(('"F32"', '"BF16"', '"U8"')), json_values),
    st.one_of(st.sampled_from(("[]", "[2,4]", "[8]", "[0]")), json_values),
    st.one_of(st.sampled_from(("[0,32]", "[32,64]", "[0,4]", "[16,48]", "[32,0]")), json_values),
)
json_headers = st.lists(st.tuples(json_keys, st.one_of(json_entries, json_values)), max_size=5).map(
    json_object
)


@thorough(500)
@given(
    header=st.one_of(json_headers, json_headers, json_values),
    length=st.one_of(st.none(), st.none(), st.none(), WILD_NUMBERS),
    data=st.sampled_from((0, 32, 64, 1000)),
)
def test_a_safetensors_header_of_wild_parts_is_read_or_refused(
    samples: Samples, header: str, length: int | None, data: int
) -> None:
    """Repeated names, overlapping offsets, nesting, numbers of any length, text that is not JSON."""
    content = lengthy(header.encode("utf-8", "surrogatepass"), length) + bytes(data)
    attempt(read_shard, samples.folder / "wild.safetensors", content)


@thorough(200)
@given(index=json_headers, whole=st.booleans())
def test_an_index_of_wild_parts_is_read_or_refused(samples: Samples, index: str, whole: bool) -> None:
    folder = samples.folder / "indexed"
    folder.mkdir(exist_ok=True)
    text = '{"weight_map":' + index + "}" if whole else index
    (folder / INDEX).write_text(text, "utf-8", "surrogatepass")

    def read(_: Path) -> None:
        with CheckpointFolder(folder):
            pass

    assert outcome(read, folder / INDEX)


# The densest that each format allows, large enough that only the factor counts.

DENSE = 2**19
DENSEST = {
    "key-values of one byte": (
        "gguf",
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, DENSE // 17)
        + b"".join(lengthy(b"%04x" % at) + struct.pack("<IB", 0, 1) for at in range(DENSE // 17)),
    ),
    "tensors of one byte": (
        "gguf",
        b"GGUF"
        + struct.pack("<IQQ", 3, DENSE // 36, 1)
        + lengthy(b"general.alignment")
        + struct.pack("<II", 4, 1)
        + b"".join(lengthy(b"%04x" % at) + struct.pack("<IQIQ", 1, 1, 24, at) for at in range(DENSE // 36))
        + bytes(DENSE // 36),
    ),
    "an array of bytes": (
        "gguf",
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, 1)
        + lengthy(b"a")
        + struct.pack("<IIQ", 9, 0, DENSE)
        + b"\xfe" * DENSE,
    ),
    "an array of 16-bit numbers": (
        "gguf",
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, 1)
        + lengthy(b"a")
        + struct.pack("<IIQ", 9, 2, DENSE // 2)
        + b"\xfe" * DENSE,
    ),
    "tokens of two bytes": (
        "gguf",
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, 1)
        + lengthy(b"tokenizer.ggml.tokens")
        + struct.pack("<IIQ", 9, 8, 2**16)
        + lengthy(b"ab") * 2**16,
    ),
    "empty lists": ("safetensors", b"{" + b'"a":[' + b"[]," * (DENSE // 3) + b"[]]}"),
    "empty objects": ("safetensors", b'{"a":[' + b"{}," * (DENSE // 3) + b"{}]}"),
    "small objects": ("safetensors", b'{"a":[' + b'{"":0},' * (DENSE // 7) + b"0]}"),
    "numbers": ("safetensors", b'{"a":[' + b"999," * (DENSE // 4) + b"0]}"),
    "wide text": ("safetensors", b'{"a":"' + b"x" * DENSE + "\U0001f600".encode() + b'"}'),
    "tensors of nothing": (
        "safetensors",
        b"{"
        + b",".join(
            b'"%04x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % at for at in range(DENSE // 54)
        )
        + b"}",
    ),
}


@pytest.mark.parametrize("case", DENSEST)
def test_the_densest_headers_stay_within_the_bound(case: str, tmp_path: Path) -> None:
    kind, content = DENSEST[case]
    if kind == "gguf":
        attempt(read_gguf, tmp_path / "dense.gguf", content)
    else:
        attempt(read_shard, tmp_path / "dense.safetensors", lengthy(content))
