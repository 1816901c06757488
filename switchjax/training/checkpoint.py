"""Checkpoints: parameters, optimiser state, the data iterator and the config, written by orbax in the background."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from switchjax.config import Config, UserError
from switchjax.parallel.processes import exchange, process_index
from switchjax.parallel.sharding import named_leaves, with_leaves
from switchjax.training.state import StatePlan, TrainState

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of a workdir, newest last, at most `keep` of them.

    Arrays are stored flat under their names (`model/decoder/norm/scale`), so that a checkpoint can be listed and
    inspected without the config that made it.
    """

    def __init__(self, workdir: Path, keep: int | None = None):
        self._directory = (workdir / "checkpoints").absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=keep is not None, read_only=keep is None, enable_async_checkpointing=True
        )
        if keep is None and not self._directory.is_dir():
            raise UserError(f"no checkpoints in {workdir}")
        self._handlers = {
            "state": ocp.PyTreeCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=self._handlers)

    def save(self, state: TrainState, data: dict[str, Any], config: Config) -> None:
        """Starts writing; the state may be donated as soon as this returns. What is there already is not written again.

        Args:
            state: what is saved; its step names the checkpoint.
            data: state of the data iterator, JSON-able.
            config: of the run.
        """
        step = int(state.step)
        if step in self.steps():
            return
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(named_leaves(state)),
                data=ocp.args.JsonSave(data),
                config=ocp.args.JsonSave(config.to_dict()),
            ),
        )
        if not saved:
            raise UserError(f"step {step} cannot be saved beside the checkpoints {self.steps()} in {self._directory}")

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def restore_latest(self, plan: StatePlan) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, with the data iterator's state; None if there is none at all.

        Those that are damaged are passed over with a message, and set aside so that their steps can be saved anew.

        Raises:
            UserError: if checkpoints are there but none can be read, or they belong to another model.
        """
        newest = self._newest_readable(lambda step: (self.restore_state(step, plan), self.restore_data(step)))
        if newest is None:
            return None
        step, restored = newest
        if process_index() == 0:
            self._set_aside([other for other in self.steps() if other > step])
        exchange("set aside")
        self._manager.reload()
        return restored

    def _set_aside(self, steps: list[int]) -> None:
        for damaged in steps:
            target = self._directory.with_name("damaged_checkpoints") / f"{damaged}-{time.time_ns()}"
            target.parent.mkdir(exist_ok=True)
            (self._directory / str(damaged)).rename(target)

    def load_model(self, plan: StatePlan, step: int = -1) -> tuple[int, Any]:
        """Step and model of a checkpoint without its optimiser; for -1, of the newest that can be read.

        Raises:
            UserError: if there is no such checkpoint, it cannot be read or belongs to another model.
        """
        if step < 0:
            newest = self._newest_readable(lambda step: self.restore_model(step, plan))
            if newest is None:
                raise UserError(f"no complete checkpoint in {self._directory}")
            return newest
        if step not in self.steps():
            raise UserError(f"no checkpoint of step {step} in {self._directory}: there are {self.steps()}")
        try:
            return step, self.restore_model(step, plan)
        except UserError:
            raise
        except Exception as error:  # whatever a damaged file makes of the reader
            raise UserError(f"checkpoint {step} in {self._directory} cannot be read: {_first_line(error)}") from None

    def _newest_readable(self, read: Callable[[int], T]) -> tuple[int, T] | None:
        """The newest step that every process can read: damage may be in the part of one of them."""
        steps: list[int] = json.loads(exchange(json.dumps(self.steps()))[0])
        for step in reversed(steps):
            try:
                content, problem = read(step), ""
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file makes of the reader
                content, problem = None, _first_line(error)
            problem = next(filter(None, exchange(problem)), "")
            if content is not None and not problem:
                return step, content
            _log.warning("checkpoint %d cannot be read and is passed over: %s", step, problem)
        if steps:
            raise UserError(f"none of the checkpoints {steps} in {self._directory} can be read")
        return None

    def restore_data(self, step: int) -> dict[str, Any]:
        """The data iterator's state of a step."""
        return self._restore_item(step, "data", ocp.args.JsonRestore())

    def restore_state(self, step: int, plan: StatePlan) -> TrainState:
        """The state of a step, laid out as `plan` says.

        Raises:
            UserError: naming the first parameter that differs in name or shape.
        """
        return with_leaves(plan.shapes, self._restore_named(step, plan.shapes, plan.shardings, ""))

    def restore_model(self, step: int, plan: StatePlan) -> Any:
        """The model of a step alone, without its optimiser.

        Raises:
            UserError: naming the first parameter that differs in name or shape.
        """
        named = self._restore_named(step, plan.shapes.model, plan.shardings.model, "model/")
        return with_leaves(plan.shapes.model, {name.removeprefix("model/"): leaf for name, leaf in named.items()})

    def _restore_named(self, step: int, shapes: Any, shardings: Any, prefix: str) -> dict[str, jax.Array]:
        wanted = {
            prefix + name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for (name, leaf), sharding in zip(
                named_leaves(shapes).items(), named_leaves(shardings).values(), strict=True
            )
        }
        _check_same(self.shapes(step), wanted, step, complete=not prefix)
        arguments = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=bool(prefix),
        )
        return self._restore_item(step, "state", arguments)

    def _restore_item(self, step: int, item: str, arguments: ocp.args.CheckpointArgs) -> Any:
        # The manager would wait for the other processes, which may have failed where this one has not.
        return self._handlers[item].restore(epath.Path(self._directory) / str(step) / item, args=arguments)

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array of a checkpoint, read without any config."""
        metadata = self._manager.item_metadata(step)["state"]
        return {name: tuple(leaf.shape) for name, leaf in metadata.tree.items()}

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the writer."""
        self._manager.close()


def _check_same(stored: dict[str, tuple[int, ...]], wanted: dict[str, Any], step: int, complete: bool) -> None:
    for name, leaf in wanted.items():
        if name not in stored:
            raise UserError(f"checkpoint {step} does not fit the config: it has no {name}")
        if stored[name] != leaf.shape:
            raise UserError(
                f"checkpoint {step} does not fit the config: {name} is {stored[name]} there and {leaf.shape} here"
            )
    extra = next((name for name in stored if name not in wanted), None)
    if complete and extra is not None:
        raise UserError(f"checkpoint {step} does not fit the config: it has {extra} besides")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
