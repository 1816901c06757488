"""The stack of a model: its layers repeat in periods, and a period is the body of a `lax.scan`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from switchjax.config import Config, Layer, UserError
from switchjax.models.attention import RelativePositionBias, attention_mask, cached_mask, positions_in_segments
from switchjax.models.blocks import make_block
from switchjax.models.cache import Cache, LayerCache, State
from switchjax.models.inputs import CrossInputs, Reports, StackInputs
from switchjax.models.layers import Norm, dropout, split_key
from switchjax.models.scan_periods import scan_periods
from switchjax.moe.expert_parallel import EXCHANGE
from switchjax.moe.routers import noncausal_because
from switchjax.parallel.sharding import unshard
from switchjax.parallel.stacking import stack


def _all_but_gathered(primitive: jex.core.Primitive, *_: object, **__: object) -> bool:
    """A remat policy that keeps a device's own part of a sharded parameter, but not the gathered whole."""
    # A sharding constraint makes the whole; an island's border (pvary) and `project` (reshape) pass it on.
    return primitive.name not in ("sharding_constraint", "pvary", "reshape")


REMAT_POLICIES: dict[str, Callable] = {
    "none": _all_but_gathered,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "exchange": jax.checkpoint_policies.save_only_these_names(EXCHANGE),
}


_CAUSAL: dict[str, Any] = {"fill_order": "token_by_token", "no_token_left_behind": 0, "dropless": True}
"""Settings that may each make a router causal; an error message names those that do."""


def check_causal(config: Config) -> None:
    """Raises a `UserError`, with reason and remedy, if a decoder's router would let later tokens change experts."""
    moe = config.moe
    if not config.model.routes_groups or moe.allow_noncausal_routing:
        return
    if (reason := noncausal_because(moe)) is not None:
        remedies = [f"moe.{k}={v}" for k, v in _CAUSAL.items() if noncausal_because(replace(moe, **{k: v})) is None]
        raise UserError(
            f"moe.router={moe.router} would let a decoder see the future: {reason}; "
            "moe.allow_noncausal_routing=True allows it" + (f", {' or '.join(remedies)} avoids it" if remedies else "")
        )


class Period(nnx.Module):
    """The blocks of one period."""

    def __init__(self, config: Config, layers: tuple[Layer, ...], cross: bool, key: PRNGKeyArray):
        keys = jax.random.split(key, len(layers))
        self.blocks = nnx.List([make_block(config, layer, cross, k) for layer, k in zip(layers, keys, strict=True)])

    def start(self, rows: int, length: int, encoded: Float[Array, "B M D"] | None) -> list[LayerCache]:
        """The blocks' caches before the first token."""
        return [block.start(rows, length, encoded) for block in self.blocks]

    def __call__(
        self,
        x: Float[Array, "B L D"],
        inputs: StackInputs,
        key: PRNGKeyArray | None,
        caches: list[LayerCache] | None = None,
    ) -> tuple[Float[Array, "B L D"], Reports, list[State]]:
        """Applies the blocks."""
        reports: Reports = {}
        states: list[State] = []
        known: Sequence[LayerCache | None] = caches or [None] * len(self.blocks)
        keys = split_key(key, len(self.blocks))
        for i, (block, block_key, cache) in enumerate(zip(self.blocks, keys, known, strict=True)):
            x, found, state = block(x, inputs, block_key, cache)
            reports |= {f"blocks/{i}/{name}": replace(report, layers=(i,)) for name, report in found.items()}
            states.append(state)
        return x, reports, states


class Stack(nnx.Module):
    """An encoder (`causal=False, cross=False`) or a decoder: blocks, the final norm and the relative position bias.

    Parameters of equal periods are stacked, also if the loop over them is unrolled.
    """

    def __init__(self, config: Config, layers: tuple[Layer, ...], causal: bool, cross: bool, key: PRNGKeyArray):
        if causal:
            check_causal(config)
        self.config, self.causal, self.sharded = config.model, causal, config.mesh.sharded == "parameters"
        bias_key, period_key = jax.random.split(key)
        relative = config.model.positions == "relative"
        self.bias = RelativePositionBias(config.model, not causal, bias_key) if relative else None
        scans = scan_periods(layers)
        self.repeats = tuple(scan.repeats for scan in scans)
        scan_keys = jax.random.split(period_key, len(scans))
        self.scans = nnx.List(
            [
                stack(partial(Period, config, scan.period, cross), jax.random.split(key, scan.repeats), "layer")
                for scan, key in zip(scans, scan_keys, strict=True)
            ]
        )
        self.norm = Norm(config.model)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        tokens: Int[Array, "B L"] | None,
        segments: Int[Array, "B L"],
        key: PRNGKeyArray | None,
        cross: CrossInputs | None = None,
    ) -> tuple[Float[Array, "B L D"], Reports]:
        """Applies all blocks: the normalised residual stream, and the reports of layers with experts.

        Args:
            x: embedded tokens.
            tokens: ids for routers that use them; None for images.
            segments: numbers of the packed sequences; 0 for padding.
            key: for dropout and routing noise; None in evaluation.
            cross: the inputs of a decoder's cross-attention.
        """
        inputs = StackInputs(
            tokens=tokens,
            segments=segments,
            self_mask=attention_mask(segments, segments, self.causal, self.config.sliding_window),
            self_bias=None if self.bias is None else self.bias(jnp.arange(x.shape[1])[None], x.shape[1]),
            positions=positions_in_segments(segments) if self.config.positions == "rotary" else None,
            cross=cross,
        )
        x, reports, _ = self._apply(x, inputs, key)
        return x, reports

    def start(
        self,
        rows: int,
        max_length: int,
        encoded: Float[Array, "B M D"] | None = None,
        encoded_segments: Int[Array, "B M"] | None = None,
    ) -> Cache:
        """The cache of a decoder that has read nothing yet, with room for `max_length` tokens per row."""
        layers = [jax.vmap(lambda period: period.start(rows, max_length, encoded))(scan) for scan in self.scans]
        return Cache(jnp.zeros(rows, jnp.int32), layers, encoded_segments, max_length)

    def extend(
        self, x: Float[Array, "B L D"], tokens: Int[Array, "B L"], token_mask: Bool[Array, "B L"], cache: Cache
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """Applies all blocks of a decoder to L further tokens per row: the normalised residual stream, the new cache.

        Padding comes after a row's tokens and does not change the cache.
        """
        positions, room = cache.positions(x.shape[1]), cache.max_length
        segments = token_mask.astype(jnp.int32)
        encoded = cache.encoded_segments
        inputs = StackInputs(
            tokens=tokens,
            segments=segments,
            self_mask=cached_mask(positions, room, self.config.sliding_window),
            self_bias=None if self.bias is None else self.bias(positions, room),
            positions=positions if self.config.positions == "rotary" else None,
            cross=None if encoded is None else CrossInputs(None, attention_mask(segments, encoded)),
            slots=jnp.where(token_mask, positions, room),
        )
        x, _, layers = self._apply(x, inputs, None, cache.layers)
        return x, replace(cache, lengths=cache.lengths + jnp.sum(segments, axis=1), layers=layers)

    def _apply(
        self,
        x: Float[Array, "B L D"],
        inputs: StackInputs,
        key: PRNGKeyArray | None,
        caches: list[list[LayerCache]] | None = None,
    ) -> tuple[Float[Array, "B L D"], Reports, list[list[LayerCache]]]:
        first_key, last_key, key = split_key(key, 3)
        x = dropout(x, self.config.dropout, first_key)
        reports: Reports = {}
        layers: list[list[LayerCache]] = []
        known: Sequence[list[LayerCache] | None] = caches or [None] * len(self.scans)
        keys = split_key(key, len(self.scans))
        first = 0  # number of the first layer of the scan
        for i, (scan, repeats, scan_key, cache) in enumerate(zip(self.scans, self.repeats, keys, known, strict=True)):
            x, found, states = self._apply_scan(scan, repeats, x, inputs, scan_key, cache)
            period = len(scan.blocks)
            for name, report in found.items():
                numbers = tuple(first + report.layers[0] + n * period for n in range(repeats))
                reports[f"scans/{i}/{name}"] = replace(report, layers=numbers)
            layers += [] if cache is None else [[replace(c, state=s) for c, s in zip(cache, states, strict=True)]]
            first += period * repeats
        return dropout(self.norm(x), self.config.dropout, last_key), reports, layers

    def _apply_scan(
        self,
        scan: Period,
        repeats: int,
        x: Float[Array, "B L D"],
        inputs: StackInputs,
        key: PRNGKeyArray | None,
        caches: list[LayerCache] | None,
    ) -> tuple[Float[Array, "B L D"], Reports, list[State]]:
        def body(x: Array, period: tuple[Any, ...]) -> tuple[Array, tuple[Reports, list[State]]]:
            module, key, caches = period
            x, reports, states = unshard(module)(x, inputs, key, caches)
            return x, (reports, states)

        if self.config.remat != "none" or self.sharded:
            body = jax.checkpoint(
                body, policy=REMAT_POLICIES[self.config.remat], prevent_cse=not self.config.scan_layers
            )
        keys = None if key is None else jax.random.split(key, repeats)
        unroll = 1 if self.config.scan_layers else repeats
        x, (reports, states) = jax.lax.scan(body, x, (scan, keys, caches), unroll=unroll)
        return x, reports, states
