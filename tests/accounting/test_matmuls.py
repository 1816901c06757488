"""The products of a program are found, in loops too, and done again."""

import jax
import jax.numpy as jnp

from switchjax.accounting.matmuls import products, products_alone


def program(x: jax.Array, weights: jax.Array, head: jax.Array) -> jax.Array:
    def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
        return jax.nn.relu(x @ weight), None

    x, _ = jax.lax.scan(layer, x, weights)
    return jax.jit(lambda x: jnp.einsum("bd,dv->bv", x, head))(x)


def test_products_are_found_as_often_as_they_run() -> None:
    found = products(program, jnp.ones((3, 4)), jnp.ones((5, 4, 4)), jnp.ones((4, 7)))
    assert [(product.left.shape, product.right.shape, product.times) for product in found] == [
        ((3, 4), (4, 4), 5),
        ((3, 4), (4, 7), 1),
    ]


def test_they_are_all_done_again_each_time() -> None:
    found = products(program, jnp.ones((3, 4)), jnp.ones((5, 4, 4)), jnp.ones((4, 7)))
    alone = products_alone(found, repeats=6)
    assert float(alone()) == 1.0
    text = jax.jit(alone).lower().compile().as_text()
    assert text.count(" dot(") == 2
    assert '"known_trip_count":{"n":"6"}' in text
    assert '"known_trip_count":{"n":"5"}' in text
