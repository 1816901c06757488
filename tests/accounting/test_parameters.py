"""What counts as a parameter."""

from switchjax.accounting.parameters import count_parameters

from switchjax.config import Config
from tests.tiny import changed


def test_a_table_that_never_changes_is_no_parameter(tiny: Config) -> None:
    switch = count_parameters(tiny)
    hashed = count_parameters(changed(tiny, moe={"router": "hash"}))
    routers = 2 * tiny.model.d_model * tiny.moe.num_experts  # one MoE layer a stack
    assert switch.total - hashed.total == switch.active - hashed.active == routers
