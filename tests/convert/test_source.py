"""Sources of weights, the ones that are refused in one line, and the keys that options change."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest
from qwq_convert.file_types import FILE_TYPES
from qwq_convert.gguf_file import read_header
from qwq_convert.imatrix.file import ImportanceMatrix, write_imatrix
from qwq_convert.key_values import Yarn, parse_override
from qwq_convert.pipeline import convert, run_conversion
from qwq_convert.plan import ConvertRequest, describe, open_source, sizes

from qwq_local.errors import ConvertError
from tests.checkpoints import CheckpointSpec, edit_json, write_checkpoint
from tests.command import qwq
from tests.convert.quantizer import BOOL, FLOAT, INT, TEXT, QuantizeOptions, llama_quantize

COMMIT = "976055f8c83f394f35dbd3ab09a285a984907bd0"
LENGTH = "qwen2.context_length"
SCALING = ("type", "factor", "original_context_length")


@pytest.fixture(params=["BF16", "F16", "F32"])
def floats(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A GGUF of floats."""
    folder = write_checkpoint(tmp_path / "model", CheckpointSpec(dtype=request.param))
    return run_conversion(ConvertRequest(folder, request.param, tmp_path / "floats.gguf"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.fixture
def own(folder: Path) -> Path:
    """The checkpoint as a GGUF in its own dtype."""
    return run_conversion(ConvertRequest(folder, "BF16", folder.parent / "own.gguf"))


@pytest.mark.parametrize("file_type", ["F32", "BF16", "F16", "Q8_0", "Q4_0", "Q4_K_M", "IQ4_NL"])
def test_a_gguf_of_floats_converts_like_llama_quantizes_output(
    file_type: str, floats: Path, tmp_path: Path
) -> None:
    ours = run_conversion(ConvertRequest(floats, file_type, tmp_path / "ours.gguf"))
    assert llama_quantize(floats, file_type, tmp_path / "reference.gguf") == 0
    assert ours.read_bytes() == (tmp_path / "reference.gguf").read_bytes()


def test_a_gguf_and_its_checkpoint_convert_to_the_same_bytes(folder: Path, own: Path) -> None:
    ours = [
        run_conversion(ConvertRequest(source, "Q8_0", own.with_name(name), name="Given"))
        for source, name in ((folder, "a.gguf"), (own, "b.gguf"))
    ]
    key = gguf.Keys.General.NAME
    assert read_header(ours[1]).value(key) == "Given"
    assert ours[0].read_bytes() == ours[1].read_bytes()


def test_a_changed_gguf_is_not_resumed(own: Path) -> None:
    request = ConvertRequest(own, "Q8_0", own.with_name("out.gguf"))
    events = convert(request)
    next(event for event in events if type(event).__name__ == "TensorDone")
    events.close()
    os.utime(own, ns=(1, 1))
    assert type(list(convert(request))[1]).__name__ == "ConversionRestarted"


def test_a_quantized_gguf_is_refused(own: Path) -> None:
    quantized = run_conversion(ConvertRequest(own, "Q8_0", own.with_name("q8.gguf")))
    reason = r"q8\.gguf: \S+ is Q8_0 already, and quantizing twice loses much\. Use the F32, F16 or BF16"
    with pytest.raises(ConvertError, match=reason):
        run_conversion(ConvertRequest(quantized, "Q4_0", own.with_name("out.gguf")))


def _written(
    path: Path,
    change: Callable[[gguf.GGUFWriter], None],
    architecture: str = "qwen2",
    n_heads: int = 4,
    n_ctx: int = 512,
) -> Path:
    """A small GGUF by the gguf package itself."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    if n_ctx:
        writer.add_context_length(n_ctx)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(2)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _with_tensor(writer: gguf.GGUFWriter, name: str = "blk.0.attn_q.weight") -> None:
    writer.add_tensor(name, np.ones((4, 64), np.float32))


def _with_wide_tensors(writer: gguf.GGUFWriter) -> None:
    writer.add_custom_alignment(1024)
    _with_tensor(writer)
    _with_tensor(writer, "blk.0.attn_k.weight")


def test_a_gguf_of_another_architecture_is_refused(tmp_path: Path) -> None:
    foreign = _written(tmp_path / "llama.gguf", _with_tensor, "llama")
    with pytest.raises(ConvertError, match=r"llama\.gguf: architecture 'llama' is not supported, only qwen2"):
        run_conversion(ConvertRequest(foreign, "Q8_0", tmp_path / "out.gguf"))


def _damaged(content: bytes, damage: str) -> bytes:
    changes: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "cut header": lambda: content[:1000],
        "cut tensors": lambda: content[:-40],
        "magic": lambda: b"GGML" + content[4:],
        "version": lambda: content[:4] + struct.pack("<I", 2) + content[8:],
        "count": lambda: content[:8] + struct.pack("<Q", 2**60) + content[16:],
    }
    return changes[damage]()


@pytest.mark.parametrize("damage", ["empty", "cut header", "cut tensors", "magic", "version", "count"])
def test_a_damaged_gguf_is_refused_by_its_name(damage: str, own: Path) -> None:
    own.write_bytes(_damaged(own.read_bytes(), damage))
    with pytest.raises(ConvertError, match=r"own\.gguf: ") as caught:
        run_conversion(ConvertRequest(own, "Q8_0", own.with_name("out.gguf")))
    assert "\n" not in str(caught.value)
    assert not own.with_name("out.gguf").exists()


def test_a_gguf_without_tensors_or_figures_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    empty = _written(tmp_path / "empty.gguf", lambda writer: None)
    with pytest.raises(ConvertError, match=r"empty\.gguf: holds no tensors"):
        run_conversion(ConvertRequest(empty, "Q8_0", out))
    odd = _written(tmp_path / "odd.gguf", _with_tensor, n_heads=5)
    with pytest.raises(
        ConvertError, match=r"odd\.gguf: 5 attention heads do not divide among 2 key-value heads"
    ):
        run_conversion(ConvertRequest(odd, "Q8_0", out))
    headless = _written(tmp_path / "headless.gguf", _with_tensor, n_heads=0)
    with pytest.raises(ConvertError, match=r"headless\.gguf: qwen2\.attention\.head_count is 0"):
        run_conversion(ConvertRequest(headless, "Q8_0", out))
    no_length = _written(tmp_path / "short.gguf", _with_tensor, n_ctx=0)
    with pytest.raises(ConvertError, match=r"short\.gguf: qwen2\.context_length is None"):
        run_conversion(ConvertRequest(no_length, "Q8_0", out))


def test_a_gguf_of_another_alignment_gets_the_usual_one(tmp_path: Path) -> None:
    """The old key would contradict the positions of the tensors."""
    source = _written(tmp_path / "wide.gguf", _with_wide_tensors)
    out = run_conversion(ConvertRequest(source, "Q8_0", tmp_path / "out.gguf"))
    header = read_header(out)
    assert "general.alignment" not in header.keys
    assert (header.alignment, len(gguf.GGUFReader(out).tensors)) == (32, 2)


def test_a_tensor_of_an_unknown_kind_gets_the_default_type(tmp_path: Path) -> None:
    source = _written(tmp_path / "extra.gguf", lambda w: _with_tensor(w, "extra.weight"))
    out = run_conversion(ConvertRequest(source, "Q4_0", tmp_path / "out.gguf"))
    assert [tensor.kind.name for tensor in read_header(out).tensors] == ["Q4_0"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none", "none: no such file or folder. Give the folder that holds config.json, or a float GGUF."),
        ("model/model.safetensors", "model.safetensors: is a file. Give the folder that holds config.json"),
        ("model/config.json", "config.json: is not a GGUF file."),
    ],
)
def test_a_wrong_source_is_refused_with_what_a_source_is(name: str, reason: str, folder: Path) -> None:
    with pytest.raises(ConvertError) as caught:
        run_conversion(ConvertRequest(folder.parent / name, "Q8_0", folder.parent / "out.gguf"))
    assert reason in str(caught.value)


@pytest.fixture
def downloaded(folder: Path) -> Path:
    """A Hugging Face home with the checkpoint as a download leaves it: blobs, and links to them."""
    home = folder.parent / "huggingface"
    repository = home / "hub" / "models--Qwen--QwQ-Tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return home


def test_a_downloaded_repository_is_converted_by_its_id(downloaded: Path) -> None:
    """The file and its name have the repository's name, though the snapshot's folder is a hash."""
    folder = downloaded.parent
    out = folder / "by-id.gguf"
    cache, home = folder / "cache", str(downloaded)
    ran = qwq(cache, "convert", "Qwen/QwQ-Tiny", "Q8_0", "-o", str(out), HF_HOME=home)
    assert (ran.status, ran.stdout) == (0, "")
    assert ran.stderr.startswith(f"{out}: ")
    assert read_header(out).value("general.name") == "QwQ Tiny"
    planned = qwq(cache, "convert", "Qwen/QwQ-Tiny", "Q8_0", "--dry-run", HF_HOME=home)
    assert "QwQ-Tiny-Q8_0.gguf: " in planned.stdout
    snapshot = downloaded / "hub" / "models--Qwen--QwQ-Tiny" / "snapshots" / COMMIT
    by_path = run_conversion(ConvertRequest(snapshot, "Q8_0", folder / "by-path.gguf"))
    assert by_path.read_bytes() == out.read_bytes()


def test_a_repository_that_is_not_downloaded_or_only_in_part_says_how_to_get_it(downloaded: Path) -> None:
    cache, home = downloaded.parent / "cache", str(downloaded)
    ran = qwq(cache, "convert", "Qwen/QwQ-32B", "Q8_0", HF_HOME=home)
    assert (ran.status, ran.stdout) == (3, "")
    assert ran.stderr.startswith("qwq: Qwen/QwQ-32B: ")
    assert "hf download Qwen/QwQ-32B" in ran.stderr
    snapshot = downloaded / "hub" / "models--Qwen--QwQ-Tiny" / "snapshots" / COMMIT
    (snapshot / "model.safetensors").unlink()
    ran = qwq(cache, "convert", "Qwen/QwQ-Tiny", "Q8_0", HF_HOME=home)
    assert ran.status == 1
    assert ran.stderr.count("\n") == 1
    assert "no *.safetensors file. Download the checkpoint's weights." in ran.stderr


def test_yarn_writes_the_keys_of_rope_scaling_in_config_json(folder: Path) -> None:
    """The model card's own entry for long texts, and the window that it makes."""
    edit_json(folder / "config.json", max_position_embeddings=40960)
    stretched = ConvertRequest(folder, "Q8_0", folder.parent / "stretched.gguf", yarn=Yarn(4.0))
    run_conversion(stretched)
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    edit_json(folder / "config.json", max_position_embeddings=131072, rope_scaling=scaling)
    stated = ConvertRequest(folder, "Q8_0", folder.parent / "stated.gguf")
    assert run_conversion(stated).read_bytes() == stretched.out.read_bytes()
    header = read_header(stretched.out)
    assert header.value(LENGTH) == 131072
    scaled = [header.value(f"qwen2.rope.scaling.{key}") for key in SCALING]
    assert scaled == ["yarn", 4.0, 32768]


YARN: dict[str, tuple[dict[str, object], Yarn, int, int]] = {
    "short window": ({"max_position_embeddings": 4096}, Yarn(2.0), 4096, 8192),
    "long window": ({"max_position_embeddings": 131072}, Yarn(4.0), 32768, 131072),
    "origin given": ({"max_position_embeddings": 131072}, Yarn(2.0, 65536), 65536, 131072),
    "yarn before": (
        {
            "max_position_embeddings": 65536,
            "rope_scaling": {
                "type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 3.0,
            },
        },
        Yarn(4.0),
        16384,
        65536,
    ),
    "linear before": (
        {"max_position_embeddings": 8192, "rope_scaling": {"type": "linear", "factor": 2.0}},
        Yarn(2.0),
        8192,
        16384,
    ),
}


@pytest.mark.parametrize("case", YARN)
def test_yarn_starts_from_the_window_the_model_was_trained_with(case: str, folder: Path) -> None:
    """32,768 at most. Of an earlier scaling only the origin stays."""
    config, yarn, origin, window = YARN[case]
    edit_json(folder / "config.json", **config)
    out = run_conversion(ConvertRequest(folder, "Q8_0", folder.parent / "out.gguf", yarn=yarn))
    header = read_header(out)
    keys = [key for key in header.keys if ".rope." in key]
    assert keys == [f"qwen2.rope.scaling.{name}" for name in SCALING] + ["qwen2.rope.freq_base"]
    assert header.value("qwen2.rope.scaling.original_context_length") == origin
    assert header.value(LENGTH) == window
    assert header.keys.index(LENGTH) == 1 + header.keys.index("qwen2.block_count")


def test_yarn_works_on_a_gguf_too(folder: Path, own: Path) -> None:
    outs = [
        run_conversion(ConvertRequest(source, "Q8_0", own.with_name(name), name="N", yarn=Yarn(4.0)))
        for source, name in ((folder, "a.gguf"), (own, "b.gguf"))
    ]
    assert outs[0].read_bytes() == outs[1].read_bytes()


@pytest.mark.parametrize("factor", [1.0, 0.0, -4.0, 1e9, float("nan"), float("inf")])
def test_a_factor_that_scales_nothing_or_too_much_is_refused(factor: float, folder: Path) -> None:
    request = ConvertRequest(folder, "Q8_0", folder.parent / "out.gguf", yarn=Yarn(factor))
    with pytest.raises(ConvertError, match=r"--yarn .*: expected a factor above 1, such as 4 for 131,072"):
        run_conversion(request)


OVERRIDES = (
    ("general.name=str:Other name", ("general.name", TEXT, "Other name")),
    ("qwen2.context_length=65536", (LENGTH, INT, 65536)),
    ("qwen2.rope.freq_base=5e5", ("qwen2.rope.freq_base", FLOAT, 5e5)),
    ("tokenizer.ggml.add_bos_token=true", ("tokenizer.ggml.add_bos_token", BOOL, True)),
    ("general.file_type=int:7", ("general.file_type", INT, 7)),
    ("a.new_key=with=signs: and colons", ("a.new_key", TEXT, "with=signs: and colons")),
    ("general.name=last", ("general.name", TEXT, "last")),
)


@pytest.mark.parametrize("with_imatrix", [False, True])
def test_overridden_keys_are_where_llama_quantize_puts_them(
    with_imatrix: bool, folder: Path, own: Path
) -> None:
    """Also with the keys of an importance matrix, which come after them."""
    overrides = [theirs for _, theirs in OVERRIDES]
    importance, path = None, None
    if with_imatrix:
        random = np.random.default_rng(1)
        sums = {f"blk.0.ffn_{kind}.weight": random.random(64, np.float32) for kind in ("gate", "up")}
        counts = {name: np.array([4], np.float32) for name in sums}
        matrix = ImportanceMatrix(sums, counts, ("text.txt",), chunk_count=2, chunk_size=512)
        path = own.with_name("imatrix.gguf")
        write_imatrix(path, matrix)
        importance = {name: values / np.float32(4) for name, values in sums.items()}
        overrides += [
            ("quantize.imatrix.file", TEXT, path.name),
            ("quantize.imatrix.dataset", TEXT, "text.txt"),
            ("quantize.imatrix.entries_count", INT, 2),
            ("quantize.imatrix.chunks_count", INT, 2),
        ]
    ours = ConvertRequest(
        folder,
        "Q4_0",
        own.with_name("ours.gguf"),
        overrides=tuple(parse_override(text) for text, _ in OVERRIDES),
        imatrix=path,
    )
    reference = own.with_name("reference.gguf")
    options = QuantizeOptions(importance=importance, overrides=overrides)
    assert llama_quantize(own, "Q4_0", reference, options) == 0
    assert run_conversion(ours).read_bytes() == reference.read_bytes()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("key", "expected KEY=VALUE"),
        ("=value", "expected KEY=VALUE"),
        ("k" * 128 + "=1", "expected KEY=VALUE"),
        ("kéy=1", "expected KEY=VALUE"),
        ("k\udcff=1", "expected KEY=VALUE"),
        ("k\n=1", "expected KEY=VALUE"),
        ("general.architecture=llama", "the file's layout hangs on it"),
        ("general.alignment=64", "the file's layout hangs on it"),
        ("split.count=2", "the file's layout hangs on it"),
        ("key=int:-1", "'-1' is not between 0 and 4294967295"),
        ("key=4294967296", "is not between 0 and 4294967295"),
        ("key=int:x", "'x' is no number"),
        ("key=int:" + "9" * 5000, "is no number"),
        ("key=float:x", "'x' is no number"),
        ("key=nan", "'nan' is no 32-bit number"),
        ("key=1e39", "'1e39' is no 32-bit number"),
        ("key=bool:yes", "'yes' is neither true nor false"),
        ("key=str:" + "ü" * 64, "is longer than 127 bytes or holds control characters"),
        ("key=str:a\x1b[2J", "is longer than 127 bytes or holds control characters"),
        ("key=str:\udcff", "is longer than 127 bytes or holds control characters"),
    ],
)
def test_an_override_that_cannot_be_written_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConvertError) as caught:
        parse_override(text)
    assert str(caught.value).startswith("--override-key ")
    assert reason in str(caught.value)


def test_a_list_cannot_be_overridden(folder: Path) -> None:
    override = parse_override("tokenizer.ggml.tokens=none")
    request = ConvertRequest(folder, "Q8_0", folder.parent / "out.gguf", overrides=(override,))
    with pytest.raises(ConvertError, match=r"tokenizer\.ggml\.tokens: is a list, which cannot be overridden"):
        run_conversion(request)


def test_an_override_without_a_type_takes_that_of_the_models_own_value(folder: Path) -> None:
    texts = ("general.name=007", "qwen2.rope.freq_base=1000000")
    overrides = tuple(map(parse_override, texts))
    request = ConvertRequest(folder, "Q8_0", folder.parent / "out.gguf", overrides=overrides)
    made = gguf.GGUFReader(run_conversion(request))
    name, base = made.fields["general.name"], made.fields["qwen2.rope.freq_base"]
    assert (name.types, name.contents()) == ([gguf.GGUFValueType.STRING], "007")
    assert (base.types, base.contents()) == ([gguf.GGUFValueType.FLOAT32], 1e6)


def test_the_planned_sizes_are_the_real_ones(folder: Path) -> None:
    request = ConvertRequest(folder, "F32", folder.parent / "out.gguf")
    with open_source(folder) as source:
        rows = sizes(describe(source))
    assert [row.name for row in rows] == list(FILE_TYPES)
    for row in rows:
        made = replace(request, file_type=row.name, out=folder.parent / f"{row.name}.gguf")
        if row.n_bytes is None or row.needs_imatrix:
            with pytest.raises(ConvertError, match=r"whole \w+ blocks|needs an importance matrix"):
                run_conversion(made)
            continue
        assert row.n_bytes == run_conversion(made).stat().st_size
        tensors = read_header(made.out).tensors
        n_weights = sum(prod(tensor.shape) for tensor in tensors)
        assert row.bits_per_weight == pytest.approx(8 * sum(t.n_bytes for t in tensors) / n_weights, rel=1e-4)
