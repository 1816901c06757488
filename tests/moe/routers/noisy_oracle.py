"""Noisy top-K gating of one token, by the equations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from switchjax.moe.routers.noisy_top_k import add_noise
from switchjax.moe.routing import Tokens
from tests.moe.routers.examples import softmax


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, 0)


def kth_excluding_by_loop(values: np.ndarray, k: int) -> np.ndarray:
    return np.array([np.sort(np.delete(values, i))[-k] for i in range(len(values))])


def cv_squared(values: np.ndarray) -> float:
    return float(np.var(values) / np.mean(values) ** 2)


def project(tokens: Tokens, weight: jax.Array) -> np.ndarray:
    return np.asarray(tokens.x, np.float64) @ np.asarray(weight, np.float64)


def drawn(tokens: Tokens, shape: tuple[int, ...]) -> np.ndarray:
    """The N(0, 1) noise that the router draws [G, *shape]; 0 in evaluation."""
    zeros = jnp.zeros((tokens.mask.shape[0], *shape))
    return np.asarray(add_noise(tokens, zeros, jnp.ones_like(zeros)), np.float64)


def gate_one_token(
    clean: np.ndarray, std: np.ndarray, noise: np.ndarray, k: int
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Gates [E], the chosen experts best first, and P(x, i) [E], in evaluation (no noise) 1 for the chosen."""
    noisy = clean + std * noise
    best = [int(i) for i in np.argsort(-noisy, kind="stable")[:k]]
    gates, probability = np.zeros(len(clean)), np.zeros(len(clean))
    gates[best] = softmax(noisy[best]) if k > 1 else softmax(noisy)[best]
    if not noise.any():
        probability[best] = 1
    elif k == len(clean):
        probability[:] = 1
    else:
        probability = ndtr((clean - kth_excluding_by_loop(noisy, k)) / std)
    return gates, best, probability
