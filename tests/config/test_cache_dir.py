"""The folder of the user's cache."""

from pathlib import Path

import pytest

from switchjax.config.cache_dir import user_cache


def test_it_is_where_the_system_says_or_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache({"XDG_CACHE_HOME": "/elsewhere"}) == Path("/elsewhere/switchjax")
    for environment in ({}, {"XDG_CACHE_HOME": ""}):
        assert user_cache(environment) == tmp_path / ".cache" / "switchjax"
