from pathlib import Path

from switchjax.data.directory import data_directory


def test_where_data_lives() -> None:
    home = {"HOME": "/h"}
    assert data_directory("/d", {"SWITCHJAX_DATA": "/e"}) == Path("/d")
    assert data_directory("", {"SWITCHJAX_DATA": "/e", "XDG_CACHE_HOME": "/x"}) == Path("/e")
    assert data_directory("", {"XDG_CACHE_HOME": "/x"}) == Path("/x/switchjax")
    assert data_directory("", home) == Path.home() / ".cache" / "switchjax"
