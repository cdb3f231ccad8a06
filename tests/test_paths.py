"""Directories: overrides, permissions, and bundled files in both layouts."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import platformdirs
import pytest

from qwq_local.errors import QwqError, UsageError
from qwq_local.paths import PACKAGE, bundled, directories, make_private


def test_each_directory_has_its_own_variable(tmp_path: Path) -> None:
    found = directories(
        {
            "QWQ_CONFIG_DIR": str(tmp_path / "config"),
            "QWQ_CACHE_DIR": str(tmp_path / "cache"),
            "QWQ_DATA_DIR": str(tmp_path / "data"),
        }
    )
    assert found.config == tmp_path / "config"
    assert found.cache == tmp_path / "cache"
    assert found.data == tmp_path / "data"
    assert list(tmp_path.iterdir()) == []


def test_without_variables_the_platform_decides() -> None:
    found = directories({"QWQ_CACHE_DIR": ""})
    assert found.config == platformdirs.user_config_path("qwq", appauthor=False)
    assert found.cache == platformdirs.user_cache_path("qwq", appauthor=False)
    assert found.data == platformdirs.user_data_path("qwq", appauthor=False)


def test_a_relative_directory_becomes_absolute_and_a_tilde_is_the_home() -> None:
    found = directories({"QWQ_CACHE_DIR": "some/cache", "QWQ_DATA_DIR": "~/qwq"})
    assert found.cache == Path.cwd() / "some" / "cache"
    assert found.data == Path.home() / "qwq"


def test_a_tilde_of_an_unknown_user_names_the_variable() -> None:
    with pytest.raises(UsageError, match=r"QWQ_DATA_DIR=~no-such-user/x"):
        directories({"QWQ_DATA_DIR": "~no-such-user/x"})


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_a_private_directory_is_for_its_owner_only(tmp_path: Path) -> None:
    made = make_private(tmp_path / "deep" / "sessions")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_an_existing_directory_keeps_its_permissions(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    make_private(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_a_file_in_the_way_of_a_directory_is_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(QwqError, match="taken"):
        make_private(tmp_path / "taken")


def test_this_checkout_uses_its_own_profiles_and_checkpoint() -> None:
    root = PACKAGE.parent
    assert bundled("profiles") == root / "profiles"
    assert bundled("miniature") == root / "miniature" / "checkpoint"


def test_an_installed_package_uses_its_bundled_copies(tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "qwq_local"
    for kind in ("profiles", "miniature"):
        (package / "bundled" / kind).mkdir(parents=True)
    assert bundled("profiles", package) == package / "bundled" / "profiles"
    assert bundled("miniature", package) == package / "bundled" / "miniature"


def test_another_projects_pyproject_beside_the_package_is_no_checkout(tmp_path: Path) -> None:
    package = tmp_path / "qwq_local"
    (package / "bundled" / "profiles").mkdir(parents=True)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "someone-else"\n')
    assert bundled("profiles", package) == package / "bundled" / "profiles"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "qwq-local"\n')
    assert bundled("profiles", package) == tmp_path / "profiles"


def test_an_installation_without_its_files_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(QwqError, match=r"lacks .*bundled.miniature.*Install qwq-local again"):
        bundled("miniature", tmp_path / "qwq_local")
