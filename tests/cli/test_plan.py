"""`qwq plan` and `--dry-run`: on a terminal, in a pipe, as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command import Ran, Terminal, environment, qwq, qwq_here
from tests.tiny_models import CHECKPOINT

MINIATURE = ("plan", "miniature")
CARD = ("plan", "--machine", "rtx-4090")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


def test_plan_shows_what_fits_a_card_before_any_download(cache: Path) -> None:
    """The project's own figures for Q4_K_M on 24 GB: 16k in f16, 31k in q8_0, 60k in q4_0."""
    ran = qwq(cache, *CARD)
    assert (ran.status, ran.stderr) == (0, "")
    table = {line.split()[0]: line for line in ran.stdout.splitlines() if " GiB " in line and "," in line[:7]}
    fits = {n_ctx: line.count("fits") for n_ctx, line in table.items()}
    assert fits == {"4,096": 3, "8,192": 3, "16,384": 3, "32,768": 2, "65,536": 1, "131,072": 0}
    assert "YaRN 2" in table["65,536"]
    assert "/65" in table["131,072"]
    assert "GPU figures unverified" in ran.stdout
    assert "weights 18.5 GiB" in ran.stdout
    assert "KV cache  q8_0, flash attention on" in ran.stdout
    assert "given up  f16 KV for q8_0" in ran.stdout


@pytest.mark.parametrize(("file_type", "gib"), [("Q4_K_M", 18.48), ("Q6_K", 25.03), ("Q8_0", 32.42)])
def test_sizes_of_files_not_yet_downloaded_are_the_published_ones(
    cache: Path, file_type: str, gib: float
) -> None:
    [plan] = objects(qwq_here(cache, "plan", f"qwq-32b:{file_type}", "--machine", "mac-128gb", "--json"))
    weights = sum(device["weights"] for device in plan["plan"]["devices"])
    assert round(weights / 2**30, 2) == gib


def test_an_unknown_type_is_refused_with_the_nearest(cache: Path) -> None:
    ran = qwq_here(cache, "plan", "qwq-32b:Q4_KM", "--machine", "rtx-4090")
    assert (ran.status, ran.stdout) == (2, "")
    assert "file type 'Q4_KM' is unknown, did you mean Q4_K_M" in ran.stderr


def objects(ran: Ran) -> list[dict[str, Any]]:
    assert ran.status in (0, 4), ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_json_has_machine_table_and_plan(cache: Path) -> None:
    [written] = objects(qwq_here(cache, *MINIATURE, "--json"))
    assert (written["v"], written["model"], written["error"]) == (2, "QwQ miniature Q8_0", None)
    assert written["machine"]["name"] == "this machine"
    assert [row["n_ctx"] for row in written["table"]] == [256, 512, 1024, 2048, 4096]
    assert [row["yarn_factor"] for row in written["table"]] == [1, 1, 1, 2, 4]
    assert [cell["kv_type"] for cell in written["table"][0]["cells"]] == ["f16", "q8_0", "q4_0"]
    assert {cell["fit"] for row in written["table"] for cell in row["cells"]} == {"fits"}
    plan = written["plan"]
    assert (plan["n_ctx"], plan["kv_type"], plan["yarn_factor"]) == (1024, "f16", 1)
    assert sum(plan["ledger"][part] for part in ("system", "files", "history", "prompt", "free")) == 1024


def test_files_are_counted_in_tokens(cache: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("once upon a time " * 40)
    [written] = objects(qwq_here(cache, *MINIATURE, "-f", str(book), "--json"))
    assert written["plan"]["ledger"]["files"] > 200
    assert written["plan"]["prompt_tokens"] > written["plan"]["ledger"]["files"]
    assert written["plan"]["yarn_factor"] == 2


def test_a_plan_that_does_not_fit_shows_its_table_and_ends_with_4(cache: Path) -> None:
    ran = qwq_here(cache, "plan", "qwq-32b:Q8_0", "--machine", "mac-32gb")
    assert ran.status == 4
    assert ran.stdout.count(" no") == 18
    assert ran.stderr.startswith("qwq: does not fit: needs ")
    assert "(1) Q5_K_M (about 21.7 GiB)" in ran.stderr
    [written] = objects(qwq_here(cache, "plan", "qwq-32b:Q8_0", "--machine", "mac-32gb", "--json"))
    assert written["plan"] is None
    assert "does not fit" in str(written["error"])


def test_an_unknown_model_and_an_unknown_machine_are_refused(cache: Path, tmp_path: Path) -> None:
    assert qwq_here(cache, "plan", "unheard-of").status == 3
    ran = qwq_here(cache, "plan", "miniature", "--machine", "rtx-4900")
    assert ran.status == 2
    assert "rtx-4090" in ran.stderr
    (tmp_path / "mine.toml").write_text("cores = 2\nmemory = 4\navailable = 3\n")
    assert "on mine" in qwq_here(cache, *MINIATURE, "--machine", str(tmp_path / "mine.toml")).stdout
    ran = qwq_here(cache, *CARD, "-f", str(tmp_path / "mine.toml"))
    assert ran.status == 3
    assert "to count the tokens of a file the model must be here" in ran.stderr


def test_a_dry_run_is_the_plan_of_the_run_itself(cache: Path) -> None:
    """The same event as the real run's, except for the free memory."""
    question = ("ask", "-m", "miniature", "--seed", "5", "--jsonl", "--set", "max_tokens=1", "what is this?")
    [dry] = objects(qwq_here(cache, *question, "--dry-run"))
    real = next(e for e in map(json.loads, qwq_here(cache, *question).stdout.splitlines()) if "n_ctx" in e)
    for event in (dry, real):
        event.pop("line")
        event["devices"] = [{**device, "usable": 0} for device in event["devices"]]
    assert dry == real


def test_a_dry_run_on_a_terminal_mentions_no_answer(cache: Path) -> None:
    ran = qwq_here(cache, "ask", "-m", "miniature", "--dry-run", "what?")
    assert (ran.status, ran.stderr) == (0, "")
    assert "context   1,024 tokens: prompt 2" in ran.stdout
    assert "context 1,024 tok: system 0 + files 0 + history 0 + prompt 2" in ran.stdout
    other = qwq_here(cache, "ask", "-m", "miniature", "--dry-run", "--machine", "rtx-5090", "what?")
    n_layers = json.loads((CHECKPOINT / "config.json").read_text())["num_hidden_layers"]
    assert f"layers    {n_layers + 1} on the GPU" in other.stdout
    assert qwq_here(cache, "ask", "-m", "miniature", "--machine", "cpu", "what?").status == 2
    assert qwq_here(cache, "ask", "-m", "miniature", "--dry-run", "--each", stdin=b"").status == 2


@pytest.mark.parametrize("size", [(80, 24), (200, 50)])
def test_a_terminal_gets_colour_and_no_line_wider_than_it(cache: Path, size: tuple[int, int]) -> None:
    with Terminal(CARD, environment(cache), *size) as terminal:
        assert terminal.read_to_end() == 0
        lines, raw = terminal.text.splitlines(), bytes(terminal.raw)
    assert lines == qwq_lines(cache, size)
    for color in (b"\x1b[32m", b"\x1b[33m", b"\x1b[34m", b"\x1b[36m", b"\x1b[35m"):
        assert color in raw
    assert raw.count(b"\x1b[0m") > 20
    assert max(map(len, lines)) <= 80 if size[0] == 80 else any(len(line) > 80 for line in lines)


def qwq_lines(cache: Path, size: tuple[int, int]) -> list[str]:
    """The same lines without colour: colour alone carries no meaning."""
    with Terminal(CARD, environment(cache, NO_COLOR="1"), *size) as terminal:
        assert terminal.read_to_end() == 0
        assert b"\x1b[3" not in terminal.raw
        return terminal.text.splitlines()
