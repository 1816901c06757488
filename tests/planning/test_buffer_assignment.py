"""The arrays at the peak of a program's memory, with the real TPU compiler."""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from switchjax.accounting.hardware import parse_slice
from switchjax.planning.buffer_assignment import compile_with_assignment, held_at_peak
from switchjax.planning.hlo import parse_compiled
from switchjax.planning.topology import describe_devices
from switchjax.studies.compile_benchmark import compiled_programs_in

pytestmark = pytest.mark.skipif(not find_spec("libtpu"), reason="the TPU compiler is not installed")


def test_what_a_loop_saves_is_held_when_the_backward_pass_begins() -> None:
    place = SingleDeviceSharding(describe_devices(parse_slice("v5e:1x1"))[0])

    def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0] ** 2)

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in ((3, 4096, 4096), (4096 - 100, 4096))
    ]
    with compiled_programs_in(None):  # a cached program for an absent device cannot be loaded
        compiled, hlo_proto = compile_with_assignment(jax.jit(jax.grad(loss), out_shardings=place).lower(*shapes))
    held = held_at_peak(hlo_proto, parse_compiled(compiled))
    saved = [one for one in held if one.shape.endswith("[3,3996,4096]")]
    # Rows are padded to the tiles of a TPU: 3996 is no multiple of 8.
    element = 2 if saved[0].shape.startswith("bf16") else 4
    assert saved[0].bytes == saved[0].count * 3 * 4000 * 4096 * element
    stats = compiled.memory_analysis()
    assert stats is not None
    total = sum(one.bytes for one in held)
    assert total <= stats.temp_size_in_bytes
    # XLA's own peak is this, beside the arguments and the result.
    beside = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert total + beside == pytest.approx(stats.peak_memory_in_bytes, abs=1 << 20)
    assert held == sorted(held, key=lambda one: -one.bytes)
