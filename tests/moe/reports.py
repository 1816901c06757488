"""The report of a router or layer as one dictionary."""

from dataclasses import fields

import jax
import jax.numpy as jnp

from switchjax.moe.losses import RoutingSummary, summarize
from switchjax.moe.routing import Routing, RoutingReport


def sums_of(report: Routing | RoutingReport) -> dict[str, jax.Array]:
    """Losses and metrics, summed over tokens."""
    assert report.metrics is not None
    return report.losses | {field.name: getattr(report.metrics, field.name) for field in fields(report.metrics)}


def contents_of(report: Routing | RoutingReport) -> dict[str, jax.Array]:
    """The whole report: `sums_of`, the values of tokens and the state sums."""
    return sums_of(report) | report.token_values | report.state_sums


def means_of(report: Routing | RoutingReport) -> dict[str, jax.Array]:
    """Losses and metrics under their fixed names, as means and shares."""
    assert report.metrics is not None
    tokens = jnp.maximum(report.metrics.tokens, 1.0)
    summary = summarize(report.metrics)
    names = [field.name for field in fields(RoutingSummary)] + ["expert_load_top", "expert_load_bottom", "dead_experts"]
    losses = {name: value / tokens for name, value in report.losses.items()}
    return losses | {name: getattr(summary, name) for name in names}
