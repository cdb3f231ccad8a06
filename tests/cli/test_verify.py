"""`qwq verify`: its output and its exit status."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from qwq_convert.gguf_file import read_header
from qwq_convert.pipeline import run_conversion
from qwq_convert.plan import ConvertRequest

from qwq_local.engine.model import LoadSettings, drained, load_model
from qwq_local.errors import AbortFlag, ModelFileError
from tests.checkpoints import CheckpointSpec, edit_json, write_checkpoint
from tests.command import ROOT, Ran, qwq, qwq_here

SPEC = CheckpointSpec(hidden_size=256, intermediate_size=256)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model", SPEC)


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> bytes:
    path = checkpoint.parent / "whole.gguf"
    run_conversion(ConvertRequest(checkpoint, "Q4_K_M", path))
    return path.read_bytes()


@pytest.fixture
def file(whole: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    return path


@pytest.fixture
def verify(cache: Path) -> Callable[..., Ran]:
    return lambda *arguments: qwq_here(cache, "verify", *map(str, arguments))


def refused(ran: Ran) -> str:
    """The only line on stderr of a failed command."""
    assert ran.status == 1, ran
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("qwq: ")
    return ran.stderr


def test_a_sound_file_is_one_line_with_its_figures(verify: Callable[..., Ran], file: Path) -> None:
    ran = verify(file)
    n_bytes = file.stat().st_size
    assert ran.stdout == (
        f"{file}: sound. 27 tensors (Q4_K 13, F32 11, Q6_K 3), {n_bytes:,} bytes, 320 tokens; "
        "every block was read.\n"
    )
    assert (ran.status, ran.stderr) == (0, "")


def test_with_its_source_a_table_shows_the_error_of_each_type(
    verify: Callable[..., Ran], file: Path, checkpoint: Path
) -> None:
    ran = verify(file, checkpoint)
    assert (ran.status, ran.stderr) == (0, "")
    _, heading, *rows, tokenizer = ran.stdout.splitlines()
    assert heading.split("  ")[0] == "TYPE"
    assert [row.split()[:2] for row in rows] == [["Q4_K", "13"], ["F32", "11"], ["Q6_K", "3"]]
    assert rows[1].split()[2] == "0.000%"
    assert all(5 < float(row.split()[2].rstrip("%")) < 9 for row in rows if row.startswith("Q4_K"))
    ends = [row.index("%") for row in (heading.replace("REL RMS", "REL RM%"), *rows)]
    assert len(set(ends)) == 1, "the column is aligned"
    assert tokenizer.startswith("tokenizer: 224 texts and ")
    assert tokenizer.endswith("the same tokens in llama.cpp and in the tokenizers library.")


def test_a_damaged_block_is_one_line_and_status_1(cache: Path, file: Path) -> None:
    """The output of libggml on the process's stderr does not reach the screen."""
    header = read_header(file)
    tensor = next(tensor for tensor in header.tensors if tensor.name == "blk.1.ffn_up.weight")
    content = bytearray(file.read_bytes())
    at = header.data_start + tensor.offset + 5 * 144
    content[at : at + 2] = b"\xff\x7f"
    file.write_bytes(content)
    assert "blk.1.ffn_up.weight has a damaged block, number 5," in refused(qwq(cache, "verify", str(file)))


def test_a_file_that_is_cut_is_one_line_and_status_1(
    verify: Callable[..., Ran], file: Path, whole: bytes
) -> None:
    file.write_bytes(whole[: len(whole) // 2])
    assert "is cut short" in refused(verify(file))
    file.write_bytes(whole[:100])
    assert "damaged GGUF header" in refused(verify(file))


def test_a_model_is_verified_by_its_name_too(verify: Callable[..., Ran]) -> None:
    ran = verify("miniature", ROOT / "miniature" / "checkpoint")
    assert ran.status == 0, ran.stderr
    assert "-Q8_0.gguf: sound. 99 tensors" in ran.stdout
    ran = verify("nothing-of-that-name")
    assert ran.status == 3
    assert "`qwq models` lists what is here" in ran.stderr


def test_a_missing_file_is_wrong_usage(verify: Callable[..., Ran], file: Path, tmp_path: Path) -> None:
    for arguments in ((tmp_path / "no.gguf",), (file, tmp_path / "nothing")):
        ran = verify(*arguments)
        assert (ran.status, ran.stdout) == (2, "")
        assert ran.stderr == f"qwq: {arguments[-1]}: no such file or folder.\n"


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("tokenizer.ggml.pre", "lacks tokenizer.ggml.pre: llama.cpp would split text in another way"),
        ("tokenizer.ggml.token_type", "lacks tokenizer.ggml.token_type: "),
        ("tokenizer.ggml.merges", "has no merges"),
        ("qwen2.block_count", "qwen2.block_count is None"),
        ("blk.1.ffn_gate.weight", "lacks the tensor blk.1.ffn_gate.weight"),
    ],
)
def test_a_missing_key_that_llama_cpp_needs_is_named(
    verify: Callable[..., Ran], file: Path, whole: bytes, key: str, says: str
) -> None:
    assert whole.count(key.encode()) == 1
    file.write_bytes(whole.replace(key.encode(), key[:-1].encode() + b"X"))
    assert says in refused(verify(file))


def test_an_extra_tensor_is_refused_as_llama_cpp_refuses_it(
    verify: Callable[..., Ran], file: Path, whole: bytes
) -> None:
    """A model of two layers whose header says one."""
    key = b"qwen2.block_count" + struct.pack("<I", 4)
    at = whole.index(key) + len(key)
    file.write_bytes(whole[:at] + struct.pack("<I", 1) + whole[at + 4 :])
    message = refused(verify(file))
    assert "holds 12 tensors that no qwen2 model has, first 'blk.1." in message
    with pytest.raises(ModelFileError, match=r"llama\.cpp refuses"):
        drained(load_model(file, LoadSettings(), AbortFlag()))


def test_a_missing_optional_key_is_a_notice(verify: Callable[..., Ran], file: Path, whole: bytes) -> None:
    content = whole.replace(b"tokenizer.chat_template", b"tokenizer.chat_templatX")
    content = content.replace(b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.eos_token_iX")
    file.write_bytes(content + bytes(77))
    ran = verify(file)
    assert ran.status == 0
    assert "sound" in ran.stdout
    assert [line.split(": ", 1)[1].split(" (")[0] for line in ran.stderr.splitlines()] == [
        "no chat template",
        "no end token",
        "77 bytes lie behind the last tensor.",
    ]


def test_weights_of_another_model_are_status_1_after_the_table(
    verify: Callable[..., Ran], file: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """The same shapes and tokenizer, but other numbers in one tensor of the source."""
    other = tmp_path / "other"
    other.mkdir()
    for path in checkpoint.iterdir():
        content = bytearray(path.read_bytes())
        if path.suffix == ".safetensors":
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            begin, end = header["model.layers.1.mlp.up_proj.weight"]["data_offsets"]
            start = len(content) - max(
                entry["data_offsets"][1] for entry in header.values() if "dtype" in entry
            )
            half = (end - begin) // 2
            moved = (
                content[start + begin + half : start + end] + content[start + begin : start + begin + half]
            )
            content[start + begin : start + end] = moved
        (other / path.name).write_bytes(content)
    ran = verify(file, other)
    assert ran.status == 1
    assert ran.stdout.count("\n") == 6
    assert ran.stderr.count("\n") == 1
    assert "blk.1.ffn_up.weight is off by 14" in ran.stderr
    assert "Q4_K allows 17.68%" in ran.stderr


def test_another_tokenizer_is_status_1_with_the_first_text_that_differs(
    verify: Callable[..., Ran], file: Path, checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in checkpoint.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    document = json.loads((other / "tokenizer.json").read_text())
    model = document["model"]
    model["merges"] = [merge for merge in model["merges"] if merge != ["t", "h"]]
    edit_json(other / "tokenizer.json", model=model)
    ran = verify(file, other)
    assert ran.status == 1
    assert "texts differently, first " in ran.stderr
    assert "(prose): [" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_without_the_tokenizers_library_the_rest_is_checked(
    cache: Path, file: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """A module of that name that fails to import hides the installed one."""
    (tmp_path / "tokenizers.py").write_text("raise ImportError('not here')\n")
    path = f"{tmp_path}:{ROOT}:{ROOT / 'convert'}"
    ran = qwq(cache, "verify", str(file), str(checkpoint), PYTHONPATH=path)
    assert ran.status == 0
    assert ran.stderr.endswith("Run: pip install tokenizers\n")
    assert "Q4_K" in ran.stdout
    assert "tokenizer:" not in ran.stdout


def test_a_float_gguf_is_compared_by_its_weights(
    verify: Callable[..., Ran], file: Path, checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "bf16.gguf"
    run_conversion(ConvertRequest(checkpoint, "BF16", source))
    ran = verify(file, source)
    assert ran.status == 0
    assert "Q4_K" in ran.stdout
    assert "the tokenizer was not compared" in ran.stderr


def test_jsonl_says_the_same_in_objects(verify: Callable[..., Ran], file: Path, checkpoint: Path) -> None:
    ran = verify(file, checkpoint, "--jsonl")
    assert (ran.status, ran.stderr) == (0, "")
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert {line["v"] for line in lines} == {2}
    events = {line["event"]: line for line in lines}
    assert list(events) == ["verifying", "sound", "comparing", "weights", "tokenizer"]
    assert events["sound"]["types"] == {"Q4_K": 13, "F32": 11, "Q6_K": 3}
    assert events["sound"]["n_bytes"] == file.stat().st_size
    for doing in ("verifying", "comparing"):
        assert events[doing]["bytes_done"] == events[doing]["bytes_total"]
    weights = {line["type"]: line for line in lines if line["event"] == "weights"}
    assert weights["F32"]["relative_rms"] == 0
    assert 0.05 < weights["Q4_K"]["relative_rms"] < weights["Q4_K"]["limit"]
    assert all(line["is_plausible"] for line in weights.values())
    assert events["tokenizer"]["differences"] == []


def test_a_split_model_is_verified_whole(
    verify: Callable[..., Ran], checkpoint: Path, tmp_path: Path
) -> None:
    run_conversion(ConvertRequest(checkpoint, "Q8_0", tmp_path / "split.gguf", split_max_bytes=300_000))
    paths = sorted(tmp_path.glob("split-*.gguf"))
    ran = verify(paths[0], checkpoint)
    assert ran.status == 0
    assert f"in {len(paths)} files" in ran.stdout
    paths[-1].unlink()
    assert f"{paths[-1].name}: cannot be read" in refused(verify(paths[0]))
