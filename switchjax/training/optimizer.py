"""Optimisers and learning-rate schedules, built from optax."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from switchjax.config import Config, OptimizerConfig
from switchjax.models.parameters import is_trained
from switchjax.parallel.sharding import is_variable, named_leaves

_TRAINED, _STATE = "gradient", "state"


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """A function from the step to the learning rate.

    rsqrt is T5's `learning_rate / sqrt(max(step, warmup_steps))`. The others start with a linear warm-up: cosine then
    falls along half a cosine to 0 at the last step, linear falls along a line to 0, constant stays.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "rsqrt":
        return lambda step: peak * jax.lax.rsqrt(jnp.maximum(step, max(warmup, 1)).astype(jnp.float32))
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, 0.0, max(steps - warmup, 1))
    else:
        decay = optax.constant_schedule(peak)
    # Step 0 has the first of the warm-up's equal increments; with a rate of 0 it would change nothing.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    schedule = optax.join_schedules([rise, decay], [warmup])
    return lambda step: schedule(step.astype(jnp.float32))


def make_optimizer(config: Config, model: nnx.Module) -> optax.GradientTransformation:
    """Adafactor with T5's settings or AdamW for `named_leaves(model)`, after clipping by global norm if set.

    Parameters that are not trained stay as they are; weight decay and clipping leave them out.

    Args:
        config: has the optimiser, its schedule and the number of steps.
        model: parameters, as arrays or shapes.
    """
    settings = config.optimizer
    schedule = make_schedule(settings, config.train.steps)
    if settings.name == "adamw":
        optimizer = optax.adamw(schedule, b1=settings.b1, b2=settings.b2, weight_decay=settings.weight_decay)
    else:
        adafactor = optax.adafactor(
            schedule,
            decay_rate=settings.decay_rate,
            clipping_threshold=1.0,
            multiply_by_parameter_scale=True,
            weight_decay_rate=settings.weight_decay or None,
        )
        optimizer = _for_each_layer(adafactor, model)
    if settings.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)
    labels = {name: _TRAINED if trained else _STATE for name, trained in is_trained(model).items()}
    return _with_promotion(optax.partition({_TRAINED: optimizer, _STATE: optax.set_to_zero()}, labels))


def _with_promotion(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` under standard type promotion, since optax divides by integers, which strict promotion forbids."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def _for_each_layer(optimizer: optax.GradientTransformation, model: nnx.Module) -> optax.GradientTransformation:
    """`optimizer` applied to each layer of stacked parameters separately.

    Adafactor scales and clips an update by root mean squares over a whole parameter. Layers share an array only for
    `lax.scan`, so each layer needs its own.
    """
    axes = jax.tree.map(lambda variable: variable.get_metadata("axes")[:1] == ("layer",), model, is_leaf=is_variable)
    stacked = {name for name, first_is_layer in named_leaves(axes).items() if first_is_layer}
    # Parameters that are not trained have no optimiser state to map over.
    trained = is_trained(model)
    labels = {
        name: leaf.shape[0] if name in stacked and trained[name] else 0 for name, leaf in named_leaves(model).items()
    }
    over_layers = optax.GradientTransformation(jax.vmap(optimizer.init), jax.vmap(optimizer.update))
    return optax.partition({n: over_layers if n else optimizer for n in set(labels.values())}, labels)
