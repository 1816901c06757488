"""Communication of a hand-written program. tests/training/test_layouts.py has real ones."""

from switchjax.planning import hlo
from switchjax.planning.hlo_collectives import Traffic
from switchjax.planning.layouts import Route, communication

STEP = """
ENTRY %main (a: f32[16,64]) -> f32[16,64] {
  %a = f32[16,64]{1,0} parameter(0)
  %s = f32[] constant(1)
  %x = f32[16,64]{1,0} all-to-all(%a), replica_groups={{0,2},{1,3}}, metadata={op_name="jit(f)/jvp()/while/exchange"}
  %y = f32[16,64]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, metadata={op_name="jit(f)/transpose(jvp())/dot"}
  %z = f32[16,64]{1,0} all-reduce(%y), replica_groups={{0,1},{2,3}}, metadata={op_name="jit(f)/transpose(jvp())/dot"}
  %n = f32[] all-reduce(%s), replica_groups={}, metadata={op_name="jit(f)/reduce_sum"}
  ROOT %w = f32[16,64]{1,0} all-reduce(%z), replica_groups={{0},{1},{2},{3}}, metadata={op_name="jit(f)/psum"}
}
"""


def test_collectives_are_told_apart_by_phase_kind_and_axes() -> None:
    mesh, whole = {"data": 1, "expert": 2, "model": 2}, 16 * 64 * 4
    found = communication(hlo.parse(STEP), mesh)
    assert found == {
        Route("forward", "all-to-all", ("expert",)): Traffic(1, whole),
        Route("backward", "all-reduce", ("model",)): Traffic(2, 2 * whole),
        Route("update", "all-reduce", ("expert", "model")): Traffic(1, 4),
    }
    assert len(communication(hlo.parse(STEP), mesh, least=8)) == 2
