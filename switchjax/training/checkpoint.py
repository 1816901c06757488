"""Checkpoints: parameters, optimiser state, the data iterator and the config, written by orbax in the background."""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from switchjax.config import Config, UserError
from switchjax.models.families import with_all_options
from switchjax.models.model import Model
from switchjax.models.parameter_paths import names_by_layer
from switchjax.parallel.processes import all_values, first_then_others, process_index
from switchjax.parallel.sharding import named_leaves, with_leaves
from switchjax.parallel.shutdown import another_has_gone
from switchjax.training.checkpoint_arrays import Wanted, read_stacked, unstacked, with_shardings
from switchjax.training.checkpoint_names import StoredArrays, current_names, exact_sources, matching_sources, parameters
from switchjax.training.state import StatePlan, TrainState
from switchjax.training.workdir import check_same_run, with_corpora

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of a workdir, newest last, at most `keep` of them.

    Arrays are stored flat under their names by layer (`model/encoder/3/ff/experts/w_in`,
    `switchjax.models.parameter_paths`), in the format `switchjax.config.formats.FORMAT`.
    """

    def __init__(self, workdir: Path, keep: int | None = None):
        self._directory = (workdir / "checkpoints").absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            read_only=keep is None,
            create=keep is not None,  # this and the next are what a read-only manager sets, with a warning
            save_interval_steps=0 if keep is None else 1,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=keep is not None,  # of saves that a kill has cut off
            lightweight_initialize=True,  # times of checkpoints are of no use here, and may not be readable
        )
        if keep is None and not self._directory.is_dir():
            raise UserError(f"no checkpoints in {workdir}")
        # orbax's own division of what several devices hold compiles a slice for each part.
        arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        self._handlers = {
            "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            "data": ocp.JsonCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
        }
        self._in_progress = False
        self._failed = False
        try:
            if keep is not None:
                self._directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=self._handlers)
        except OSError as error:
            raise UserError(f"cannot use {self._directory} for checkpoints: {error.strerror}") from None

    def save(self, state: TrainState, data: dict[str, Any], config: Config) -> None:
        """Starts writing; the state may be donated as soon as this returns. What is there already is not written again.

        Args:
            state: what is saved; its step names the checkpoint.
            data: state of the data iterator, JSON-able.
            config: of the run.

        Raises:
            UserError: if this or the one before cannot be written.
        """
        step = int(state.step)
        if step in self.steps():
            return
        arrays = unstacked(config, named_leaves(state))
        with self._writing():
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays),
                    data=ocp.args.JsonSave(data),
                    config=ocp.args.JsonSave(config.to_saved()),
                ),
            )
        self._in_progress = True
        if not saved:
            raise UserError(f"step {step} cannot be saved beside the checkpoints {self.steps()} in {self._directory}")

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def restore_latest(self, plan: StatePlan, fingerprint: str) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, with the data iterator's state; None if there is none at all.

        Those that are damaged, or of another run, are passed over with a message, and set aside so that their steps can
        be saved anew.

        Args:
            plan: of the run.
            fingerprint: of its data.

        Raises:
            UserError: if checkpoints are there but none can be read, or they belong to another model or other data.
        """

        def read(step: int) -> tuple[TrainState, dict[str, Any]]:
            state, data = self.restore_state(step, plan), self.restore_data(step)
            saved = with_all_options(Config.from_saved(self._saved_config(step)))
            found = f"checkpoint {step} in {self._directory}"
            if data["fingerprint"] != fingerprint:
                raise UserError(
                    f"the data is not what {found} was trained on: corpora or vocabulary have changed; "
                    f"it was trained with data.corpora={saved.data.corpora}"
                )
            # Older ones name corpora that could not be had as well.
            saved = with_corpora(saved, plan.config.data.corpora)
            check_same_run(saved, plan.config, f"{found} is of another run", "remove it")
            if int(state.step) != step:
                raise UserError(f"{found} is of step {int(state.step)}")
            return state, data

        newest = self._newest_readable(read)
        if newest is None:
            return None
        step, restored = newest
        first_then_others(lambda: self._clear_way(step))
        self._manager.reload()
        return restored

    def _clear_way(self, step: int) -> None:
        """Sets aside what stands where later steps are to be saved, and whatever is no checkpoint."""
        for other in self._numbered() if process_index() == 0 else ():
            if other > step or not self._is_whole(other):
                self._set_aside(other)

    def load_model(self, plan: StatePlan, step: int = -1) -> tuple[int, Any]:
        """Step and model of a checkpoint without its optimiser; for -1, of the newest that can be read.

        Raises:
            UserError: if there is no such checkpoint, it cannot be read or belongs to another model.
        """
        return self._load(lambda step: self.restore_model(step, plan), step)

    def load_matching(self, plan: StatePlan, model: Model, step: int = -1) -> tuple[Model, set[str]]:
        """`model` with every parameter that a checkpoint, perhaps of another model, has under the same name by layer.

        Args:
            plan: of the run.
            model: its fresh model.
            step: of the checkpoint; -1: the newest that can be read.

        Returns:
            The model, and the names by layer of the parameters taken.

        Raises:
            UserError: as `load_model`, but only if no parameter fits, or one of the same name has another shape.
        """
        return self._load(lambda step: self._restore_matching(step, plan, model), step)[1]

    def load_model_and_fingerprint(self, plan: StatePlan, step: int = -1) -> tuple[int, tuple[Any, str]]:
        """As `load_model`, with the fingerprint of the data that the model was trained on.

        Raises:
            UserError: as `load_model`.
        """
        return self._load(lambda step: (self.restore_model(step, plan), self.restore_data(step)["fingerprint"]), step)

    def _load(self, read: Callable[[int], T], step: int) -> tuple[int, T]:
        if step < 0:
            newest = self._newest_readable(read)
            if newest is None:
                raise UserError(f"no complete checkpoint in {self._directory}")
            return newest
        if step not in self.steps():
            raise UserError(f"no checkpoint of step {step} in {self._directory}: there are {self.steps()}")
        try:
            return step, read(step)
        except UserError:
            raise
        except Exception as error:  # whatever a damaged file makes of the reader
            raise UserError(f"checkpoint {step} in {self._directory} cannot be read: {_first_line(error)}") from None

    def _newest_readable(self, read: Callable[[int], T]) -> tuple[int, T] | None:
        """The newest step that every process can read: damage may be in the part of one of them."""
        passed_over: list[str] = []
        misfit: UserError | None = None
        steps: list[int] = json.loads(all_values(json.dumps(self._numbered()))[0])
        for step in reversed(steps):
            found, problem = None, ""
            try:
                if not self._is_whole(step):
                    raise FileNotFoundError(f"it does not hold {', '.join(self._handlers)}")
                found = read(step)
            except UserError as error:  # foreign, or all of them are and this is not their config
                misfit = misfit or error
                problem = f"checkpoint {step} is not of this run and is passed over: {error}"
            except Exception as error:  # whatever a damaged file makes of the reader
                problem = f"checkpoint {step} cannot be read and is passed over: {_first_line(error)}"
            problem = next(filter(None, all_values(problem)), "")
            if found is not None and not problem:
                for message in passed_over:
                    _log.warning(message)
                return step, found
            passed_over.append(problem)
        if misfit:
            raise misfit
        if passed_over:
            raise UserError(f"none of the checkpoints {steps} in {self._directory} can be read")
        return None

    def _numbered(self) -> list[int]:
        """The steps that anything in the folder is named after, in order."""
        return sorted(
            int(path.name)
            for path in self._directory.iterdir()
            if path.name.isdecimal() and str(int(path.name)) == path.name
        )

    def _is_whole(self, step: int) -> bool:
        """Whether what is named after a step has the parts of a checkpoint."""
        try:
            return all((self._directory / str(step) / item).is_dir() for item in self._handlers)
        except OSError:  # not ours to read
            return False

    def _set_aside(self, step: int) -> None:
        target = self._directory.with_name("damaged_checkpoints") / f"{step}-{time.time_ns()}"
        try:
            target.parent.mkdir(exist_ok=True)
            (self._directory / str(step)).rename(target)
        except OSError as error:
            raise UserError(
                f"{self._directory / str(step)} is in the way and cannot be moved to {target}: {error.strerror}"
            ) from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the file system, in as many types as there are layers
            self._failed = True
            if another_has_gone(error):
                raise
            whole = [step for step in self._numbered() if self._is_whole(step)]
            raise UserError(
                f"cannot write a checkpoint to {self._directory}: {_reason(error)}; those of steps {whole} are intact"
            ) from error

    def restore_data(self, step: int) -> dict[str, Any]:
        """The data iterator's state of a step."""
        return self._restore_item(step, "data", ocp.args.JsonRestore())

    def _saved_config(self, step: int) -> dict[str, Any]:
        return self._restore_item(step, "config", ocp.args.JsonRestore())

    def restore_state(self, step: int, plan: StatePlan) -> TrainState:
        """The state of a step, laid out as `plan` says.

        Raises:
            UserError: naming the first array that is missing, has another shape or is one too many.
        """
        return self._restore_exactly(step, plan, plan.shapes, plan.shardings, self._stored(step))

    def restore_model(self, step: int, plan: StatePlan) -> Model:
        """The model of a step alone, without its optimiser.

        Raises:
            UserError: naming the first parameter that is missing, has another shape or is one too many.
        """
        return self._restore_exactly(
            step, plan, plan.shapes.model, plan.shardings.model, parameters(self._stored(step))
        )

    def _restore_exactly(self, step: int, plan: StatePlan, shapes: Any, shardings: Any, stored: StoredArrays) -> Any:
        wanted = with_shardings(shapes, shardings)
        sources = exact_sources(plan.config, wanted, stored, f"checkpoint {step}")
        return with_leaves(shapes, read_stacked(wanted, sources, partial(self._restore_arrays, step), {}))

    def _restore_matching(self, step: int, plan: StatePlan, model: Model) -> tuple[Model, set[str]]:
        wanted, stored = with_shardings(plan.shapes.model, plan.shardings.model), parameters(self._stored(step))
        saved, found = Config.from_saved(self._saved_config(step)), f"checkpoint {step} in {self._directory}"
        sources = matching_sources(plan.config, wanted, stored, saved, found)
        leaves = read_stacked(wanted, sources, partial(self._restore_arrays, step), named_leaves(model))
        return with_leaves(model, leaves), stored.keys() & names_by_layer(plan.config, wanted)

    def _restore_arrays(self, step: int, wanted: Wanted) -> dict[str, jax.Array]:
        arguments = ocp.args.PyTreeRestore(
            item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        return self._restore_item(step, "state", arguments)

    def _stored(self, step: int) -> StoredArrays:
        return current_names(self._manager.item_metadata(step)["state"].tree, self._saved_config(step))

    def _restore_item(self, step: int, item: str, arguments: ocp.args.CheckpointArgs) -> Any:
        # The manager would wait for the other processes, which may have failed where this one has not.
        return self._handlers[item].restore(epath.Path(self._directory) / str(step) / item, args=arguments)

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Name by layer and shape of every array of a checkpoint."""
        return {name: array.shape for name, array in self._stored(step).items()}

    def check(self) -> None:
        """Notices at once, and not at the next save, that the one in progress has failed; waits for nothing.

        Raises:
            UserError: as `wait`.
        """
        if self._in_progress and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            UserError: if it cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()
        self._in_progress = False

    def close(self) -> None:
        """Waits and releases the writer.

        Raises:
            UserError: as `wait`, but for an error that has been raised already.
        """
        with suppress(Exception) if self._failed else self._writing():
            self._manager.close()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _reason(error: Exception) -> str:
    """What the operating system said, if it was the operating system."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's
    return os.strerror(int(code[1])) if code else _first_line(error)
