"""The transformer stack: runs of repeating periods, one period of which is the body of a `lax.scan`."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from switchjax.config import Config, Layer, UserError
from switchjax.models.attention import RelativePositionBias, attention_mask, positions_in_segments
from switchjax.models.blocks import CrossInputs, StackInputs, make_block
from switchjax.models.layers import dropout, make_norm, split_key
from switchjax.models.runs import find_runs
from switchjax.moe.exchange import EXCHANGE
from switchjax.moe.layer import RoutingSums, noncausal_because
from switchjax.moe.routers import ROUTERS
from switchjax.parallel.stacking import stack

REMAT_POLICIES: dict[str, Callable] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "exchange": jax.checkpoint_policies.save_only_these_names(EXCHANGE),
}


def check_causal(config: Config) -> None:
    """Refuses, for a decoder, routers that let what comes after a token change its experts.

    Raises:
        UserError: saying why, and what to set.
    """
    if not config.model.has_experts or "peer" in config.model.pattern or config.moe.allow_noncausal_routing:
        return
    if (reason := noncausal_because(config.moe)) is not None:
        raise UserError(
            f"moe.router={config.moe.router} would let a decoder see the future: {reason}; "
            "moe.allow_noncausal_routing=True asks for it by name"
            + (
                ""
                if ROUTERS[config.moe.router].noncausal
                else ", moe.fill_order=token_by_token or moe.dropless=True avoids it"
            )
        )


class Period(nnx.Module):
    """The blocks of one period."""

    def __init__(self, config: Config, layers: tuple[Layer, ...], cross: bool, key: PRNGKeyArray):
        keys = jax.random.split(key, len(layers))
        self.blocks = nnx.List([make_block(config, layer, cross, k) for layer, k in zip(layers, keys, strict=True)])

    def __call__(
        self, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L D"], RoutingSums | None]:
        """Applies the blocks; routing sums carry the period's MoE layers on their first axis, None without any."""
        layers: list[RoutingSums] = []
        for block, block_key in zip(self.blocks, split_key(key, len(self.blocks)), strict=True):
            x, sums = block(x, inputs, block_key)
            layers += sums
        return x, jax.tree.map(lambda *values: jnp.stack(values), *layers) if layers else None


class Stack(nnx.Module):
    """An encoder (`causal=False, cross=False`) or a decoder: blocks, final norm and the relative position bias.

    Parameters are stacked over the periods of a run whether its loop is compiled as a loop or unrolled, so checkpoints
    do not depend on `model.scan_layers`.
    """

    def __init__(self, config: Config, layers: tuple[Layer, ...], causal: bool, cross: bool, key: PRNGKeyArray):
        if causal:
            check_causal(config)
        self.config, self.causal = config.model, causal
        bias_key, period_key = jax.random.split(key)
        relative = config.model.positions == "relative"
        self.bias = RelativePositionBias(config.model, not causal, bias_key) if relative else None
        runs = find_runs(layers)
        self.repeats = tuple(run.repeats for run in runs)
        run_keys = jax.random.split(period_key, len(runs))
        self.runs = nnx.List(
            [
                stack(partial(Period, config, run.period, cross), jax.random.split(key, run.repeats), "layer")
                for run, key in zip(runs, run_keys, strict=True)
            ]
        )
        self.norm = make_norm(config.model)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        tokens: Int[Array, "B L"] | None,
        segments: Int[Array, "B L"],
        key: PRNGKeyArray | None,
        cross: CrossInputs | None = None,
    ) -> tuple[Float[Array, "B L D"], list[RoutingSums]]:
        """Applies all blocks.

        Args:
            x: embedded tokens.
            tokens: their ids, for routers that go by them; None for images.
            segments: the packed sequence that each token belongs to, 0 for padding.
            key: for dropout and routing noise; None in evaluation.
            cross: what the cross-attention of a decoder attends to.

        Returns:
            The normalised residual stream, and the routing sums of each run with MoE layers, these on a first axis.
        """
        inputs = StackInputs(
            tokens=tokens,
            segments=segments,
            self_mask=attention_mask(segments, segments, self.causal, self.config.sliding_window),
            self_bias=None if self.bias is None else self.bias(x.shape[1], x.shape[1]),
            positions=positions_in_segments(segments) if self.config.positions == "rotary" else None,
            cross=cross,
        )
        first_key, last_key, key = split_key(key, 3)
        x = dropout(x, self.config.dropout, first_key)
        routing: list[RoutingSums] = []
        for run, repeats, run_key in zip(self.runs, self.repeats, split_key(key, len(self.runs)), strict=True):
            x, sums = self._apply_run(run, repeats, x, inputs, run_key)
            routing += [] if sums is None else [sums]
        return dropout(self.norm(x), self.config.dropout, last_key), routing

    def _apply_run(
        self, run: Period, repeats: int, x: Float[Array, "B L D"], inputs: StackInputs, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L D"], RoutingSums | None]:
        def body(x: Array, period: tuple[Period, PRNGKeyArray | None]) -> tuple[Array, RoutingSums | None]:
            module, key = period
            return module(x, inputs, key)

        if self.config.remat != "none":
            body = jax.checkpoint(
                body, policy=REMAT_POLICIES[self.config.remat], prevent_cse=not self.config.scan_layers
            )
        keys = None if key is None else jax.random.split(key, repeats)
        x, sums = jax.lax.scan(body, x, (run, keys), unroll=1 if self.config.scan_layers else repeats)
        return x, jax.tree.map(lambda values: values.reshape(-1, *values.shape[2:]), sums)
