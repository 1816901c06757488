"""Optimisers and learning-rate schedules, all optax's."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from switchjax.config import OptimizerConfig
from switchjax.parallel.sharding import is_variable, named_leaves


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate.

    rsqrt: `learning_rate / sqrt(max(step, warmup_steps))` (T5); cosine: linear warm-up, then half a cosine down to 0 at
    the last step; constant: linear warm-up, then constant.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "rsqrt":
        return lambda step: peak * jax.lax.rsqrt(jnp.maximum(step, max(warmup, 1)).astype(jnp.float32))
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    else:
        decay = optax.constant_schedule(peak)
    # Step 0 takes the first of the warm-up's equal increments: at a rate of 0 it would change nothing.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    schedule = optax.join_schedules([rise, decay], [warmup])
    return lambda step: schedule(step.astype(jnp.float32))


def make_optimizer(config: OptimizerConfig, steps: int, model: nnx.Module) -> optax.GradientTransformation:
    """Adafactor with T5's settings or AdamW, after clipping by global norm if that is on; for `named_leaves(model)`.

    Args:
        config: the optimiser and its schedule.
        steps: length of the run, for the cosine schedule.
        model: the parameters, arrays or their shapes.
    """
    schedule = make_schedule(config, steps)
    if config.name == "adamw":
        optimizer = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    else:
        optimizer = _for_each_layer(
            optax.adafactor(
                schedule,
                decay_rate=config.decay_rate,
                clipping_threshold=1.0,
                multiply_by_parameter_scale=True,
                weight_decay_rate=config.weight_decay or None,
            ),
            model,
        )
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return _with_promotion(optimizer)


def _with_promotion(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """optax counts in integers and divides by them, which JAX allows unless told to be strict."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def _for_each_layer(optimizer: optax.GradientTransformation, model: nnx.Module) -> optax.GradientTransformation:
    """`optimizer` applied to every layer of stacked parameters by itself.

    Adafactor scales an update by the parameter's root mean square and clips it by its own: for layers that share an
    array only because `lax.scan` wants it so, these are to be each layer's.
    """

    axes = jax.tree.map(lambda variable: variable.get_metadata("axes")[0] == "layer", model, is_leaf=is_variable)
    stacked = named_leaves(axes)
    labels = {name: leaf.shape[0] if stacked[name] else 0 for name, leaf in named_leaves(model).items()}
    over_layers = optax.GradientTransformation(jax.vmap(optimizer.init), jax.vmap(optimizer.update))
    return optax.partition({n: over_layers if n else optimizer for n in set(labels.values())}, labels)
