"""Negative log perplexity on held-out text, corpus by corpus."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from switchjax.config import Config, UserError
from switchjax.data.pipeline import TextData
from switchjax.models.encoder_decoder import Batch, EncoderDecoder
from switchjax.parallel.mesh import one_at_a_time
from switchjax.training.checkpoint import Checkpoints
from switchjax.training.loop import Evaluator, place_batch
from switchjax.training.state import plan_state
from switchjax.training.step import Metrics, token_losses


def perplexity_evaluator(config: Config, data: TextData, mesh: Mesh) -> Evaluator:
    """A function from a model to its metrics on `config.evaluate.split`.

    Its results: `neg_log_perplexity` (mean log-likelihood of a target token, nats) over all corpora together and
    `neg_log_perplexity/CORPUS` of each; `target_tokens`; for MoE models `fraction_tokens_dropped` at the evaluation's
    capacity.
    """
    evaluate = config.evaluate
    batches = {
        corpus: [
            place_batch(batch, mesh) for batch in data.evaluation_batches(corpus, evaluate.split, evaluate.batches)
        ]
        for corpus in data.corpora
    }
    batches = {corpus: rows for corpus, rows in batches.items() if rows}
    if not batches:
        raise UserError(f"no corpus has held-out text in its {evaluate.split} split")
    step = jax.jit(_sums)

    def evaluator(model: EncoderDecoder) -> dict[str, float]:
        totals = {}
        for corpus, rows in batches.items():
            sums = [one_at_a_time(step(model, batch)) for batch in rows]
            totals[corpus] = jax.tree.map(lambda *values: np.sum(values), *jax.device_get(sums))
        return _results(totals)

    return evaluator


def evaluate_workdir(config: Config, workdir: Path, mesh: Mesh, step: int = -1) -> tuple[int, dict[str, float]]:
    """The step and the metrics of a workdir's checkpoint, the latest for -1.

    Raises:
        UserError: if there is no such checkpoint.
    """
    with jax.set_mesh(mesh):
        step, model = load_model(config, workdir, mesh, step)
        return step, perplexity_evaluator(config, TextData.prepare(config.data), mesh)(model)


def load_model(config: Config, workdir: Path, mesh: Mesh, step: int = -1) -> tuple[int, EncoderDecoder]:
    """The model of a workdir's checkpoint, the latest for -1, laid over `mesh`; and its step.

    Raises:
        UserError: if there is no such checkpoint, or it does not fit the config.
    """
    checkpoints = Checkpoints(workdir)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"no complete checkpoint in {workdir}")
    chosen = step if step >= 0 else steps[-1]
    model = checkpoints.restore_model(chosen, plan_state(config, mesh))
    checkpoints.close()
    return chosen, model


def _sums(model: EncoderDecoder, batch: Batch) -> Metrics:
    logits, routing = model(batch, None)
    mask = batch["decoder_segments"] > 0
    nll, _ = token_losses(logits, batch["decoder_targets"], mask)
    return {
        "nll": nll,
        "target_tokens": jnp.sum(mask),
        "routed": sum(jnp.sum(sums["routed"]) for sums in routing.values()),
        "dispatched": sum(jnp.sum(sums["dispatched"]) for sums in routing.values()),
    }


def _results(totals: dict[str, Metrics]) -> dict[str, float]:
    overall = {name: np.sum([sums[name] for sums in totals.values()]) for name in next(iter(totals.values()))}
    results = {"neg_log_perplexity": -overall["nll"] / max(overall["target_tokens"], 1)}
    for corpus, sums in totals.items():
        results[f"neg_log_perplexity/{corpus}"] = -sums["nll"] / max(sums["target_tokens"], 1)
    results["target_tokens"] = overall["target_tokens"]
    if overall["routed"]:
        results["fraction_tokens_dropped"] = 1 - overall["dispatched"] / overall["routed"]
    return {name: float(value) for name, value in results.items()}
