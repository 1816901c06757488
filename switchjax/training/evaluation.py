"""Negative log perplexity on held-out text or images, corpus by corpus."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switchjax.config import Config, UserError
from switchjax.data.data import Data
from switchjax.data.prepare import prepare_data
from switchjax.models.model import Batch, Model
from switchjax.parallel.mesh import check_fit, one_at_a_time
from switchjax.parallel.sharding import place_batch, process_rows
from switchjax.training.checkpoint import Checkpoints
from switchjax.training.objective import count_batch, sum_over_targets
from switchjax.training.state import plan_state
from switchjax.training.step import Metrics
from switchjax.training.workdir import vocabulary_path

_log = logging.getLogger(__name__)


class Evaluator:
    """Measures a model on `config.evaluate.split` of the run's corpora; warns about corpora without that split.

    The constructor raises a `UserError` if no corpus has that split.
    """

    def __init__(self, config: Config, data: Data, mesh: Mesh) -> None:
        self._config, self._data, self._mesh = config, data, mesh
        self._own_rows = process_rows(mesh, config.data.batch_size)
        self._step = jax.jit(partial(_sums, config), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._corpora = [corpus for corpus in data.corpora if next(self._batches(corpus), None) is not None]
        split = config.evaluate.split
        for corpus in set(data.corpora) - set(self._corpora):
            _log.warning("corpus %s has nothing in its %s split: not evaluated", corpus, split)
        if not self._corpora:
            raise UserError(f"no corpus has anything in its {split} split")

    def __call__(self, model: Model, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """The metrics of `model`; calls `check` before each batch, which may raise to stop the evaluation.

        Returns:
            `neg_log_perplexity` (mean log-likelihood of a target token, in nats) over all corpora together and
            `neg_log_perplexity/CORPUS` for each; `accuracy`, the fraction of targets that get the highest probability;
            `target_tokens`; for MoE models, `fraction_tokens_dropped` at the capacity of evaluation.
        """
        totals = {}
        for corpus in self._corpora:
            sums = []
            for batch in self._batches(corpus):
                check()
                sums.append(one_at_a_time(self._step(model, batch)))
            totals[corpus] = jax.tree.map(lambda *values: np.sum(values), *jax.device_get(sums))
        return _results(totals)

    def _batches(self, corpus: str) -> Iterator[Batch]:
        evaluate = self._config.evaluate
        rows = self._data.evaluation_batches(corpus, evaluate.split, evaluate.batches, self._own_rows)
        return (place_batch(batch, self._mesh) for batch in rows)


def evaluate_workdir(config: Config, workdir: Path, mesh: Mesh, step: int = -1) -> tuple[int, dict[str, float]]:
    """The step and the metrics of a workdir's checkpoint (-1: the latest), with the vocabulary of its run.

    Raises a `UserError` if there is no such checkpoint or it cannot be read.
    """
    check_fit(config, mesh)
    vocabulary = "" if config.model.family == "vision" else str(vocabulary_path(workdir))
    data = prepare_data(dataclasses.replace(config.data, vocabulary=vocabulary))
    with jax.set_mesh(mesh), closing(Checkpoints(workdir)) as checkpoints:
        step, (model, fingerprint) = checkpoints.load_model_and_fingerprint(plan_state(config, mesh), step)
        if fingerprint != data.fingerprint:
            _log.warning("the corpora here differ from those on which %s was trained", workdir)
        return step, Evaluator(config, data, mesh)(model)


def load_model(config: Config, workdir: Path, mesh: Mesh, step: int = -1) -> tuple[int, Model]:
    """The step and the model of a workdir's checkpoint (-1: the latest), laid over `mesh`.

    Raises a `UserError` if there is no such checkpoint or it does not fit the config.
    """
    with closing(Checkpoints(workdir)) as checkpoints:
        return checkpoints.load_model(plan_state(config, mesh), step)


def _sums(config: Config, model: Model, batch: Batch) -> Metrics:
    """Sums over a batch, from which `_results` computes the metrics."""
    sums = sum_over_targets(config, model, batch, None)
    routed = [report.metrics for report in sums.reports.values() if report.metrics is not None]
    return {
        "nll": sums.nll,
        "correct": sums.correct,
        "target_tokens": count_batch(model, batch).targets,
        "routed": sum(jnp.sum(metrics.routed) for metrics in routed),
        "dispatched": sum(jnp.sum(metrics.dispatched) for metrics in routed),
    }


def _results(totals: dict[str, Metrics]) -> dict[str, float]:
    overall = {name: np.sum([sums[name] for sums in totals.values()]) for name in next(iter(totals.values()))}
    results = {"neg_log_perplexity": -overall["nll"] / max(overall["target_tokens"], 1)}
    for corpus, sums in totals.items():
        results[f"neg_log_perplexity/{corpus}"] = -sums["nll"] / max(sums["target_tokens"], 1)
    results["accuracy"] = overall["correct"] / max(overall["target_tokens"], 1)
    results["target_tokens"] = overall["target_tokens"]
    if overall["routed"]:
        results["fraction_tokens_dropped"] = 1 - overall["dispatched"] / overall["routed"]
    return {name: float(value) for name, value in results.items()}
