"""The table of layouts."""

import pytest

from switchjax.planning.hlo_collectives import Traffic
from switchjax.planning.layouts import Route
from switchjax.studies import layout_study
from switchjax.studies.layout_study import LAYOUTS, make_row
from tests.studies.written import check_written, measure
from tests.test_configs import MODULES, config_of

ROUTES = {
    Route("forward", "all-to-all", ("expert",)): Traffic(1, 4096),
    Route("backward", "all-reduce", ("model",)): Traffic(2, 8192),
    Route("backward", "all-reduce", ("data", "expert")): Traffic(1, 4),
}


def test_the_study_measures_the_layouts_of_the_config() -> None:
    assert tuple(MODULES["layouts"].SIZES) == LAYOUTS


def test_a_row_has_the_collectives_of_each_phase() -> None:
    row = make_row("all", config_of("layouts", "expert-model-data"), ROUTES)
    assert row.mesh == {"data": 2, "expert": 2, "model": 2}
    assert row.forward == {"all-to-all over expert": Traffic(1, 4096)}
    assert row.update == {}
    ((line,),) = check_written([row], "docs/layouts.md")
    backward = "2 all-reduce over model, 8.0 KiB<br>1 all-reduce over data x expert, 4 bytes"
    assert line == f"| all | 2 x 2 x 2 | 1 all-to-all over expert, 4.0 KiB | {backward} | - |"


def test_a_layout_is_compiled_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_study, "LAYOUTS", ("data",))
    (row,) = measure(layout_study, [], {"layouts.py:data": config_of("layouts", "data")})
    assert row.forward == row.update == {}
    assert {route.split(" ")[0] for route in row.backward} == {"all-reduce"}
