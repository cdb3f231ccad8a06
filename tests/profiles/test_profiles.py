"""Profiles: their layers, refusals, the bundled ones, and `qwq profiles`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwq_local.cli.profiles import app, check_model, listing_lines, profile_lines
from qwq_local.engine.api import DEFAULT_ORDER, ContextSettings, SamplerSettings
from qwq_local.errors import ModelNotFound, ProfileError
from qwq_local.paths import Directories
from qwq_local.profiles.keys import RULES, Profile, accepted
from qwq_local.profiles.layers import (
    MAX_FILE_BYTES,
    ProfileFolders,
    ProfileKind,
    list_profiles,
    model_profile_name,
    profile_folders,
    resolve,
)

MATH_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
CHOICE_PROMPT = (
    'Please show your choice in the answer field with only the choice letter, e.g., "answer": "C".'
)


@pytest.fixture
def folders(tmp_path: Path) -> ProfileFolders:
    """The bundled profiles and an empty configuration directory."""
    return profile_folders(Directories(tmp_path / "config", tmp_path / "cache", tmp_path / "data"))


@pytest.fixture
def made_up(tmp_path: Path) -> ProfileFolders:
    """Bundled profiles made for these tests, so that each layer can be seen to win."""
    made = ProfileFolders(own=tmp_path / "own", bundled=tmp_path / "bundled")
    for kind, name in ((ProfileKind.MODEL, "qwq-32b"), (ProfileKind.TASK, "chat")):
        made.files(kind, name)[1].parent.mkdir(parents=True)
        made.files(kind, name)[1].write_text("")
    return made


def write_own(folders: ProfileFolders, kind: ProfileKind, name: str, text: str) -> Path:
    path = folders.files(kind, name)[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folders: ProfileFolders, task: str = "chat") -> str:
    with pytest.raises(ProfileError) as caught:
        resolve("qwq-32b", task, folders)
    return str(caught.value)


# Layers


def test_each_layer_beats_the_one_below_and_the_origin_says_so(made_up: ProfileFolders) -> None:
    def top_k() -> tuple[int, str]:
        found = resolve("qwq-32b", "chat", made_up, environ, settings)
        return found.profile.top_k, found.origins["top_k"]

    environ: dict[str, str] = {}
    settings: list[str] = []
    assert top_k() == (40, "default")
    made_up.files(ProfileKind.MODEL, "qwq-32b")[1].write_text("top_k = 1")
    assert top_k() == (1, "bundled models/qwq-32b.toml")
    own_model = write_own(made_up, ProfileKind.MODEL, "qwq-32b", "top_k = 2")
    assert top_k() == (2, str(own_model))
    made_up.files(ProfileKind.TASK, "chat")[1].write_text("top_k = 3")
    assert top_k() == (3, "bundled tasks/chat.toml")
    own_task = write_own(made_up, ProfileKind.TASK, "chat", "top_k = 4")
    assert top_k() == (4, str(own_task))
    environ["QWQ_TOP_K"] = "5"
    assert top_k() == (5, "QWQ_TOP_K")
    settings.append("top_k=6")
    assert top_k() == (6, "--set")
    settings.append("top_k=7")
    assert top_k() == (7, "--set")


def test_a_users_profile_overrides_key_by_key(folders: ProfileFolders) -> None:
    write_own(folders, ProfileKind.TASK, "math", "thinking_budget = 1000")
    found = resolve("qwq-32b", "math", folders).profile
    assert found.thinking_budget == 1000
    assert found.question_suffix == MATH_PROMPT


def test_a_profile_starts_from_the_one_it_extends(folders: ProfileFolders) -> None:
    write_own(folders, ProfileKind.TASK, "exam", 'extends = "math"\nthinking_budget = 1000')
    write_own(folders, ProfileKind.TASK, "oral-exam", 'extends = "exam"\nanswer_reserve = 99')
    found = resolve("qwq-32b", "oral-exam", folders)
    assert found.profile.question_suffix == MATH_PROMPT
    assert (found.profile.thinking_budget, found.profile.answer_reserve) == (1000, 99)
    assert found.origins["question_suffix"] == "bundled tasks/math.toml"


def test_extending_a_bundled_name_goes_through_the_users_own_version_of_it(folders: ProfileFolders) -> None:
    write_own(folders, ProfileKind.TASK, "math", "top_k = 20")
    write_own(folders, ProfileKind.TASK, "exam", 'extends = "math"')
    found = resolve("qwq-32b", "exam", folders).profile
    assert (found.top_k, found.question_suffix) == (20, MATH_PROMPT)


def test_a_profile_that_extends_another_no_longer_builds_on_its_bundled_namesake(
    folders: ProfileFolders,
) -> None:
    write_own(folders, ProfileKind.TASK, "math", 'extends = "code"')
    found = resolve("qwq-32b", "math", folders).profile
    assert (found.question_suffix, found.answer_reserve) == ("", 8192)


def test_extending_its_own_name_means_the_bundled_one(folders: ProfileFolders) -> None:
    write_own(folders, ProfileKind.TASK, "math", 'extends = "math"\ntop_k = 20')
    assert resolve("qwq-32b", "math", folders).profile.question_suffix == MATH_PROMPT


def test_extending_in_a_circle_is_refused_with_the_circle(folders: ProfileFolders) -> None:
    write_own(folders, ProfileKind.TASK, "a", 'extends = "b"')
    write_own(folders, ProfileKind.TASK, "b", 'extends = "c"')
    path = write_own(folders, ProfileKind.TASK, "c", 'extends = "a"')
    assert f"{path}: extends goes in a circle: a -> b -> c -> a" in refusal(folders, "a")
    write_own(folders, ProfileKind.TASK, "alone", 'extends = "alone"')
    assert "circle: alone -> alone" in refusal(folders, "alone")


def test_extending_what_does_not_exist_names_the_file_that_asked(folders: ProfileFolders) -> None:
    path = write_own(folders, ProfileKind.TASK, "exam", 'extends = "maths"')
    message = refusal(folders, "exam")
    assert message.startswith(f"{path}: extends: ")
    assert "Did you mean math?" in message


def test_one_folder_can_be_the_users_and_the_bundled_one(made_up: ProfileFolders) -> None:
    same = ProfileFolders(own=made_up.bundled, bundled=made_up.bundled)
    assert resolve("qwq-32b", "chat", same).profile == Profile()


def test_no_task_leaves_the_models_values(folders: ProfileFolders) -> None:
    found = resolve("qwq-32b", None, folders)
    assert (found.task, found.profile.description[:7]) == (None, "QwQ-32B")


# The environment


def test_an_empty_variable_counts_as_not_set(folders: ProfileFolders) -> None:
    assert resolve("qwq-32b", "chat", folders, {"QWQ_TOP_K": ""}).origins["top_k"] != "QWQ_TOP_K"


def test_a_wrong_value_names_the_variable(folders: ProfileFolders) -> None:
    with pytest.raises(ProfileError, match=r'^QWQ_TOP_P: top_p is "2", allowed: a number above 0 up to 1\.'):
        resolve("qwq-32b", "chat", folders, {"QWQ_TOP_P": "2"})


def test_a_variable_that_looks_misspelt_gives_a_notice(folders: ProfileFolders) -> None:
    environ = {"QWQ_TEMPRATURE": "1", "QWQ_temperature": "1", "QWQ_PROFIL": "math"}
    notices = resolve("qwq-32b", "chat", folders, environ).notices
    assert len(notices) == 3
    assert "QWQ_PROFIL is not read. Did you mean QWQ_PROFILE?" in notices[0]
    assert "QWQ_TEMPRATURE is not read. Did you mean QWQ_TEMPERATURE?" in notices[1]


def test_our_own_and_foreign_variables_give_no_notice(folders: ProfileFolders) -> None:
    environ = dict.fromkeys(["QWQ_MODEL", "QWQ_PROFILE", "QWQ_DATA_DIR", "QWQ_BUILD_NUMBER", "TOP_K"], "x")
    assert resolve("qwq-32b", "chat", folders, environ).notices == ()


# Refusals


def test_an_unknown_key_names_the_file_the_key_and_the_nearest(folders: ProfileFolders) -> None:
    path = write_own(folders, ProfileKind.TASK, "chat", "temprature = 1")
    message = refusal(folders)
    assert message.startswith(f'{path}: there is no key "temprature". Did you mean temperature?')
    write_own(folders, ProfileKind.TASK, "chat", "temp = 1")  # by its letters closer to system
    assert "Did you mean temperature?" in refusal(folders)


def test_a_key_under_a_heading_is_an_error_that_says_where_it_belongs(folders: ProfileFolders) -> None:
    write_own(folders, ProfileKind.TASK, "chat", "[zzz]\ntemperature = 1")
    assert "top level" in refusal(folders)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('temperature = "hot"', 'temperature is "hot", allowed: a number from 0 to 5.'),
        ("temperature = true", "temperature is true, allowed: a number"),
        ("temperature = nan", "temperature is nan, allowed: a number"),
        ("temperature = [1]", "temperature is [1], allowed: a number"),
        ("top_k = 1.5", "top_k is 1.5, allowed: a whole number from 0 to 1,000,000."),
        ("top_p = 0", "top_p is 0, allowed: a number above 0 up to 1."),
        ("min_p = 1.01", "min_p is 1.01, allowed: a number from 0 to 1."),
        ("penalty_window = -2", "penalty_window is -2, allowed: a whole number from -1 "),
        ("n_ctx = 63", "n_ctx is 63, allowed: a whole number from 64 to 1,048,576 or auto."),
        ('n_ctx = "large"', 'n_ctx is "large"'),
        (f"n_ctx = 0x{'f' * 9000}", "n_ctx is a huge number"),
        ("seed = 4294967295", "seed is 4294967295"),
        ("yarn = 0.5", "yarn is 0.5, allowed: a number from 1 to 64 or off or auto."),
        ('kv_type = "q3_K"', 'kv_type is "q3_K", allowed: one of f16, bf16, f32, q8_0'),
        ('flash_attention = "yes"', "allowed: on, off or auto."),
        ('loop_guard = "auto"', "allowed: on or off."),
        ("system = 1", "system is 1, allowed: text"),
        ('system = "a\\u0000b"', r'system is "a\x00b", allowed: text'),
        ('repo = "QwQ"', "allowed: owner/name"),
        ("files = 1", "files is 1, allowed: a table"),
        ('[files]\nQ8_0 = "../x.gguf"', "allowed: a table"),
        ('[files]\nQ8_0 = "/x.gguf"', "allowed: a table"),
        ('sampler_order = ["top_k", "top_q"]', "allowed: a list without repetition, each one of penalties"),
        ('sampler_order = ["top_k", "top_k"]', "allowed: a list without repetition"),
        ('sampler_order = "top_k"', "allowed: a list without repetition"),
        ("extends = 1", "extends is 1, allowed: the name of a profile."),
        ('extends = "../math"', "allowed: the name of a profile."),
    ],
)
def test_a_value_that_is_not_allowed_names_file_and_key(
    folders: ProfileFolders, line: str, complaint: str
) -> None:
    path = write_own(folders, ProfileKind.TASK, "chat", line)
    message = refusal(folders)
    assert message.startswith(f"{path}: ")
    assert complaint in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"temperature = ", "not TOML"),
        (b"a = " + b"[" * 5000, "not TOML"),
        (b"n_ctx = " + b"9" * 5000, "not TOML"),
        ("system = 'déjà'".encode("latin-1"), "not UTF-8 text at byte 11"),
        (b"#" * (MAX_FILE_BYTES + 1), "larger than 65,536 bytes"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_with_its_name(
    folders: ProfileFolders, content: bytes, complaint: str
) -> None:
    path = write_own(folders, ProfileKind.TASK, "chat", "")
    path.write_bytes(content)
    message = refusal(folders)
    assert message.startswith(f"{path}: ")
    assert complaint in message
    assert "\n" not in message


@pytest.mark.skipif(os.name == "nt", reason="Windows calls an endless name simply absent")
def test_a_configuration_directory_that_cannot_be_entered_is_an_error_with_its_path(
    made_up: ProfileFolders,
) -> None:
    endless = ProfileFolders(own=Path("/" + "x" * 5000), bundled=made_up.bundled)
    with pytest.raises(ProfileError, match=r"qwq-32b\.toml: File name too long"):
        resolve("qwq-32b", "chat", endless)


def test_a_byte_order_mark_does_no_harm(folders: ProfileFolders) -> None:
    write_own(folders, ProfileKind.TASK, "chat", "\ufefftop_k = 7")
    assert resolve("qwq-32b", "chat", folders).profile.top_k == 7


@pytest.mark.parametrize(
    "name", ["../math", "/etc/passwd", "a/b", "a\\b", "", ".", "..", ".hidden", "a\0b", "x" * 65, "math\n"]
)
def test_a_name_cannot_leave_its_folder(folders: ProfileFolders, name: str) -> None:
    write_own(folders, ProfileKind.MODEL, "math", "top_k = 1")
    assert "is no profile name" in refusal(folders, name)


def test_an_unknown_task_gives_the_nearest_or_all_and_where_to_put_it(folders: ProfileFolders) -> None:
    assert "Did you mean math?" in refusal(folders, "maths")
    message = refusal(folders, "zzzz")
    assert "There are chat, choice, code, long, math." in message
    assert str(folders.own / "tasks" / "zzzz.toml") in message


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("temperature", "write --set key=value"),
        ("temprature=1", 'no key "temprature". Did you mean temperature?'),
        ("temperature=hot", 'temperature is "hot", allowed: a number'),
        ("temperature=inf", "allowed: a number"),
        ("seed=1.5", "allowed: a whole number"),
        ("files=Q8_0", "written in a profile file"),
        ("sampler_order=top_k,", "each one of penalties"),
        ("=1", 'no key ""'),
        (
            "yarn=8",
            "--set: yarn is 8, allowed: off, auto or one of 1,2,4 "
            "(yarn_factors: bundled models/qwq-32b.toml)",
        ),
    ],
)
def test_a_wrong_setting_says_what_is_allowed(made_up: ProfileFolders, setting: str, complaint: str) -> None:
    made_up.files(ProfileKind.MODEL, "qwq-32b")[1].write_text("yarn_factors = [1, 2, 4]")
    with pytest.raises(ProfileError) as caught:
        resolve("qwq-32b", "chat", made_up, {}, [setting])
    assert complaint in str(caught.value)


def test_a_quantized_kv_cache_without_flash_attention_is_refused(folders: ProfileFolders) -> None:
    with pytest.raises(ProfileError, match=r"kv_type q8_0 .* needs flash attention, which is off \(--set\)"):
        resolve("qwq-32b", "chat", folders, {}, ["flash_attention=off", "kv_type=q8_0"])
    found = resolve("qwq-32b", "chat", folders, {}, ["flash_attention=off"])
    assert found.profile.flash_attention is False


# Values


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("temperature=0.7", "temperature", 0.7),
        ("temperature=1", "temperature", 1.0),
        ("n_ctx=4096", "n_ctx", 4096),
        ("n_ctx=auto", "n_ctx", None),
        ("seed=42", "seed", 42),
        ("seed=random", "seed", None),
        ("yarn=off", "yarn", 1.0),
        ("yarn=4", "yarn", 4.0),
        ("flash_attention=auto", "flash_attention", None),
        ("use_mmap=false", "use_mmap", False),
        ("loop_guard=off", "loop_guard", False),
        ("sampler_order=top_k, temperature", "sampler_order", ("top_k", "temperature")),
        ("sampler_order=", "sampler_order", ()),
        ("system=a=b, c", "system", "a=b, c"),
        ("system=", "system", ""),
    ],
)
def test_a_setting_is_read_by_the_type_of_its_key(
    folders: ProfileFolders, setting: str, key: str, value: object
) -> None:
    found = getattr(resolve("qwq-32b", "chat", folders, {}, [setting]).profile, key)
    assert found == value
    assert type(found) is type(value)


def test_every_field_has_a_rule_and_every_default_keeps_it() -> None:
    assert [*RULES, "is_window_known"] == [field.name for field in fields(Profile)]
    for key, rule in RULES.items():
        default = getattr(Profile(), key)
        if isinstance(default, str):
            assert accepted(key, default, "file") == default
        elif not isinstance(default, Mapping):
            assert accepted(key, rule.show(default), "--set", is_text=True) == default, key


def test_the_defaults_are_those_of_the_engine() -> None:
    context = ContextSettings(n_ctx=64)
    assert Profile().sampler_settings(seed=0) == SamplerSettings()
    assert Profile().sampler_order == DEFAULT_ORDER
    assert (Profile().n_batch, Profile().n_ubatch) == (context.n_batch, context.n_ubatch)
    assert Profile().threads == context.threads


def test_values_that_depend_on_memory_are_left_to_the_plan() -> None:
    undecided = ("n_ctx", "yarn", "kv_type", "flash_attention", "n_gpu_layers")
    assert [getattr(Profile(), key) for key in undecided] == [None] * len(undecided)
    assert [RULES[key].show(None) for key in undecided] == ["auto"] * len(undecided)


def test_sampler_settings_carry_every_value_of_the_profile(folders: ProfileFolders) -> None:
    settings = [
        "temperature=0.9",
        "dry_multiplier=0.8",
        "xtc_threshold=0.2",
        "sampler_order=top_k,temperature",
    ]
    found = resolve("qwq-32b", "chat", folders, {}, settings).profile.sampler_settings(seed=5)
    assert found == SamplerSettings(
        temperature=0.9,
        dry_multiplier=0.8,
        xtc_threshold=0.2,
        sampler_order=("top_k", "temperature"),
        seed=5,
    )


# The bundled profiles


@pytest.mark.parametrize("model", ["qwq-32b", "miniature"])
@pytest.mark.parametrize("task", [None, "chat", "math", "choice", "code", "long"])
def test_every_bundled_profile_resolves(folders: ProfileFolders, model: str, task: str | None) -> None:
    found = resolve(model, task, folders)
    assert (found.model, found.task) == (model, task)
    assert found.profile.thinking_budget + found.profile.answer_reserve < found.profile.native_window


def test_there_are_two_models_and_five_tasks(folders: ProfileFolders) -> None:
    entries = list(list_profiles(folders))
    assert [entry.name for entry in entries if entry.kind is ProfileKind.MODEL] == ["miniature", "qwq-32b"]
    tasks = [entry.name for entry in entries if entry.kind is ProfileKind.TASK]
    assert tasks == ["chat", "choice", "code", "long", "math"]
    assert all(entry.description and not entry.problem for entry in entries)


def test_the_standard_prompts_equal_the_model_cards_word_for_word(folders: ProfileFolders) -> None:
    suffixes = {
        task: resolve("qwq-32b", task, folders).profile.question_suffix
        for task in folders.names(ProfileKind.TASK)
    }
    expected = {"chat": "", "choice": CHOICE_PROMPT, "code": "", "long": "", "math": MATH_PROMPT}
    assert suffixes == expected


def test_the_profile_of_qwq_32b_follows_its_model_card(folders: ProfileFolders) -> None:
    found = resolve("qwq-32b", "chat", folders).profile
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.6, 0.95, 40, 0.0)
    assert (found.repeat_penalty, found.presence_penalty, found.dry_multiplier) == (1.0, 0.0, 0.0)
    assert (found.native_window, found.yarn_origin, found.yarn_factors) == (32768, 32768, (1.0, 2.0, 4.0))
    order = [step for step in found.sampler_order if step in ("top_k", "top_p", "min_p", "temperature")]
    assert order == ["top_k", "top_p", "min_p", "temperature"]
    assert found.system == ""
    assert found.repo == "Qwen/QwQ-32B-GGUF"
    assert found.files["Q4_K_M"] == "qwq-32b-q4_k_m.gguf"
    assert list(found.files) == ["Q4_K_M", "Q5_0", "Q5_K_M", "Q6_K", "Q8_0"]


def test_no_task_scales_the_window_where_the_tokens_do_not_need_it(folders: ProfileFolders) -> None:
    assert {resolve("qwq-32b", task, folders).profile.yarn for task in folders.names(ProfileKind.TASK)} == {
        None
    }


def test_a_small_model_caps_what_a_task_asks_for(folders: ProfileFolders) -> None:
    found = resolve("miniature", "math", folders)
    assert (found.profile.thinking_budget, found.profile.answer_reserve) == (600, 150)
    expected = "bundled models/miniature.toml: max_thinking_budget (the task asks for 24,576)"
    assert found.origins["thinking_budget"] == expected


def test_a_flag_and_a_variable_are_not_capped(folders: ProfileFolders) -> None:
    environ = {"QWQ_ANSWER_RESERVE": "200"}
    found = resolve("miniature", "math", folders, environ, ["thinking_budget=700"]).profile
    assert (found.thinking_budget, found.answer_reserve) == (700, 200)


@pytest.mark.parametrize(
    ("model", "profile"),
    [
        ("miniature", "miniature"),
        ("qwq-32b", "qwq-32b"),
        ("qwq-32b:Q4_K_M", "qwq-32b"),
        ("bartowski/Qwen_QwQ-32B-GGUF", "qwq-32b"),
        ("mine", "mine"),
        ("mine:Q8_0", "mine"),
        ("/models/mine.gguf", "mine"),
        ("/models/mine.GGUF", "mine"),
        ("/models/other.gguf", "qwq-32b"),
        ("../tasks/chat", "qwq-32b"),
        ("", "qwq-32b"),
        ("a\0b", "qwq-32b"),
    ],
)
def test_a_model_uses_the_profile_of_its_name_or_that_of_qwq_32b(
    folders: ProfileFolders, model: str, profile: str
) -> None:
    write_own(folders, ProfileKind.MODEL, "mine", "native_window = 4096")
    assert model_profile_name(model, folders) == profile


def test_profiles_are_found_in_an_installed_wheel(tmp_path: Path) -> None:
    installed = tmp_path / "site-packages" / "qwq_local" / "bundled" / "profiles"
    (installed / "models").mkdir(parents=True)
    (installed / "models" / "qwq-32b.toml").write_text("top_k = 33")
    folders = ProfileFolders(own=tmp_path / "config", bundled=installed)
    assert resolve("anything", None, folders).profile.top_k == 33


# `qwq profiles`


def test_the_list_marks_the_users_profiles(folders: ProfileFolders) -> None:
    write_own(folders, ProfileKind.TASK, "math", 'description = "Sums"')
    write_own(folders, ProfileKind.TASK, "exam", 'extends = "math"')
    write_own(folders, ProfileKind.TASK, "broken", "top_q = 1")
    lines = list(listing_lines(folders))
    assert lines[0].split() == ["NAME", "KIND", "SOURCE", "DESCRIPTION"]
    rows = {line.split()[0]: line for line in lines[1:-2]}
    assert rows["math"].split(maxsplit=2)[2].startswith("own over bundled  Sums")
    assert rows["exam"].split(maxsplit=2)[2].endswith("Sums")
    assert "cannot be read" in rows["broken"]
    assert "Did you mean top_" in rows["broken"]
    assert rows["chat"].index("bundled") == rows["broken"].index("own ") == lines[0].index("SOURCE")


def test_show_prints_every_key_with_value_and_origin(folders: ProfileFolders) -> None:
    lines = list(profile_lines(resolve("qwq-32b", "math", folders, {}, ["temperature=0.5"])))
    assert lines[:2] == ["math on qwq-32b", ""]
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[3:]}
    assert list(rows) == list(RULES)
    assert rows["temperature"].split() == ["0.5", "--set"]
    assert rows["seed"].split() == ["random", "default"]
    assert rows["question_suffix"] == f'"{MATH_PROMPT}"  bundled tasks/math.toml'


def test_control_characters_in_a_profile_never_reach_the_screen(folders: ProfileFolders) -> None:
    write_own(
        folders,
        ProfileKind.TASK,
        "evil",
        'description = "\\u001b[2J\\u009b2J"\nsystem = "\\u001b]0;x\\u0007"',
    )
    lines = [*listing_lines(folders), *profile_lines(resolve("qwq-32b", "evil", folders))]
    assert all(line.isprintable() for line in lines)


def test_the_command_lists_shows_and_sets(tmp_path: Path) -> None:
    clean: dict[str, str | None] = {name: None for name in os.environ if name.startswith("QWQ_")}
    environ = clean | {"QWQ_CONFIG_DIR": str(tmp_path), "QWQ_TOP_K": "20", "QWQ_SEEDS": "1"}
    runner = CliRunner()

    listed = runner.invoke(app, [], env=environ)
    assert listed.exit_code == 0
    assert "miniature  model  bundled" in listed.stdout
    assert str(tmp_path / "profiles" / "tasks") in listed.stdout

    arguments = ["show", "choice", "--model", "miniature", "--set", "n_ctx=512", "--set", "n_batch=64"]
    shown = runner.invoke(app, arguments, env=environ)
    assert shown.exit_code == 0
    rows = {line.split()[0]: line.split()[1:] for line in shown.stdout.splitlines() if line}
    assert rows["choice"] == ["on", "miniature"]
    assert rows["n_ctx"] == ["512", "--set"]
    assert rows["n_batch"] == ["64", "--set"]
    assert rows["top_k"] == ["20", "QWQ_TOP_K"]
    assert shown.stderr == "The environment variable QWQ_SEEDS is not read. Did you mean QWQ_SEED?\n"

    model = runner.invoke(app, ["show", "miniature"], env=environ)
    assert model.stdout.startswith("miniature\n")


def test_the_command_raises_profile_errors(tmp_path: Path) -> None:
    failed = CliRunner().invoke(app, ["show", "maths"], env={"QWQ_CONFIG_DIR": str(tmp_path)})
    assert isinstance(failed.exception, ProfileError)


@pytest.mark.parametrize(
    "model",
    [
        "miniature",
        "miniature:F16",
        "qwq-32b:Q4_K_M",
        "/models/QwQ-32B.gguf",
        "other.GGUF",
        "owner/QwQ:Q8_0",
        "mine",
        "Mi",
        "Q5_K_M",
        "qwq-merge",
    ],
)
def test_every_known_model_can_be_shown(folders: ProfileFolders, model: str) -> None:
    check_model(model, folders, lambda: ["mine", "ollama/qwq-merge:Q5_K_M"])


def test_a_misspelt_model_is_an_error_that_names_the_nearest(folders: ProfileFolders) -> None:
    with pytest.raises(ModelNotFound, match=r"'miniatur' .* Did you mean miniature\?"):
        check_model("miniatur", folders, list)
    with pytest.raises(ModelNotFound, match=r"Did you mean mine\?"):
        check_model("mien", folders, lambda: ["mine"])
    with pytest.raises(ModelNotFound, match="There are miniature, qwq-32b"):
        check_model("zzz", folders, list)
    failed = CliRunner().invoke(app, ["show", "math", "--model", "miniatur"])
    assert isinstance(failed.exception, ModelNotFound)
