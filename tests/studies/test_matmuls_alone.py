"""The products alone are all products of a program."""

import jax
import jax.numpy as jnp

from switchjax.accounting.matmuls import matmuls
from switchjax.studies.matmuls_alone import matmuls_alone
from tests.accounting.test_matmuls import program


def test_they_are_all_done_again_each_time() -> None:
    found = matmuls(program, {"layers": jnp.ones((5, 4, 4)), "head": jnp.ones((4, 7))}, jnp.ones((3, 4)))
    alone = matmuls_alone(found, repeats=6)
    assert float(alone()) == 1.0
    text = jax.jit(alone).lower().compile().as_text()
    assert text.count(" dot(") == 2
    assert '"known_trip_count":{"n":"6"}' in text
    assert '"known_trip_count":{"n":"5"}' in text
