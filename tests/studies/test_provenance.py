"""A table says where it comes from."""

from datetime import date
from importlib.metadata import version

from switchjax.studies.provenance import origin, show_origin


def test_figures_say_where_they_come_from() -> None:
    found = origin("make table")
    assert date.fromisoformat(found["date"]) <= date.today()
    assert f"jax {version('jax')}," in found["versions"]
    assert "load" in found["machine"]
    assert all(value in show_origin(found) for value in found.values())
