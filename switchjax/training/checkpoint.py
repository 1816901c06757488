"""Checkpoints of parameters, optimiser state, data iterator and config, written by orbax in the background."""

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
    """The newest `keep` checkpoints of a workdir; without `keep`, all of them, to read only.

    Arrays are stored flat under their names by layer (`model/encoder/3/ff/experts/w_in`,
    `switchjax.models.parameter_paths`), in the format `switchjax.config.formats.FORMAT`.
    """

    def __init__(self, workdir: Path, keep: int | None = None):
        self._directory = (workdir / "checkpoints").absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            read_only=keep is None,
            create=keep is not None,  # a read-only manager sets this and the next value itself, with a warning
            save_interval_steps=0 if keep is None else 1,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=keep is not None,  # a killed save leaves them
            lightweight_initialize=True,  # does not read the checkpoints' times, which may be unreadable
        )
        if keep is None and not self._directory.is_dir():
            raise UserError(f"no checkpoints in {workdir}")
        # To divide replicated arrays between devices, orbax would compile a slice for each part; `unstacked` does it.
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
        """Starts writing a checkpoint unless its step has one; the state may be donated as soon as this returns.

        Raises a `UserError` if this checkpoint or the one before cannot be written.
        """
        step = int(state.step)
        if step in self.steps():
            return
        arrays = unstacked(config, named_leaves(state))
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays),
            data=ocp.args.JsonSave(data),
            config=ocp.args.JsonSave(config.to_saved()),
        )
        with self._writing():
            saved = self._manager.save(step, args=items)
        self._in_progress = True
        if not saved:
            raise UserError(f"step {step} cannot be saved beside the checkpoints {self.steps()} in {self._directory}")

    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def restore_latest(self, plan: StatePlan, fingerprint: str) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest readable checkpoint's state and data iterator; None if the workdir has no checkpoint.

        Checkpoints that are damaged, belong to another run or have another data `fingerprint` are skipped with a
        warning and moved to `damaged_checkpoints`, so that their steps can be saved again.

        Raises:
            UserError: if no checkpoint can be read, or all belong to another model or other data.
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
            # An older version also recorded corpora that were unavailable.
            saved = with_corpora(saved, plan.config.data.corpora)
            check_same_run(saved, plan.config, f"{found} is of another run", "remove it")
            if int(state.step) != step:
                raise UserError(f"{found} is of step {int(state.step)}")
            return state, data

        newest = self._newest_readable(read)
        if newest is None:
            return None
        step, restored = newest
        first_then_others(lambda: self._set_aside_after(step))
        self._manager.reload()
        return restored

    def load_model(self, plan: StatePlan, step: int = -1) -> tuple[int, Any]:
        """The step and the model of a checkpoint; -1 stands for the newest readable one.

        Raises:
            UserError: if there is no such checkpoint, it cannot be read or belongs to another model.
        """
        return self._load(lambda step: self.restore_model(step, plan), step)

    def load_matching(self, plan: StatePlan, model: Model, step: int = -1) -> tuple[Model, set[str]]:
        """`model` with the parameters that a checkpoint, perhaps of another model, has under the same names by layer.

        Also returns the names of these parameters. A `step` of -1 stands for the newest readable checkpoint.

        Raises:
            UserError: if there is no such checkpoint, it cannot be read, it shares no parameter with `model`, or a
                parameter has another shape there.
        """

        def read(step: int) -> tuple[Model, set[str]]:
            wanted, stored = with_shardings(plan.shapes.model, plan.shardings.model), parameters(self._stored(step))
            saved, found = Config.from_saved(self._saved_config(step)), f"checkpoint {step} in {self._directory}"
            sources = matching_sources(plan.config, wanted, stored, saved, found)
            leaves = read_stacked(wanted, sources, partial(self._restore_arrays, step), named_leaves(model))
            return with_leaves(model, leaves), stored.keys() & names_by_layer(plan.config, wanted)

        return self._load(read, step)[1]

    def load_model_and_fingerprint(self, plan: StatePlan, step: int = -1) -> tuple[int, tuple[Any, str]]:
        """Like `load_model`, with the fingerprint of the model's training data."""
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
        except Exception as error:  # a damaged file may raise anything
            raise UserError(f"checkpoint {step} in {self._directory} cannot be read: {_first_line(error)}") from None

    def _newest_readable(self, read: Callable[[int], T]) -> tuple[int, T] | None:
        """The newest step that all processes can read, and what `read` gives for it."""
        skipped: list[str] = []
        misfit: UserError | None = None
        steps: list[int] = json.loads(all_values(json.dumps(self._numbered()))[0])
        for step in reversed(steps):
            found, problem = None, ""
            try:
                if not self._is_whole(step):
                    raise FileNotFoundError(f"it does not hold {', '.join(self._handlers)}")
                found = read(step)
            except UserError as error:
                misfit = misfit or error
                problem = f"checkpoint {step} belongs to another run and is skipped: {error}"
            except Exception as error:  # a damaged file may raise anything
                problem = f"checkpoint {step} cannot be read and is skipped: {_first_line(error)}"
            # The damage may lie in the part that one process reads; all processes must choose the same step.
            problem = next(filter(None, all_values(problem)), "")
            if found is not None and not problem:
                for message in skipped:
                    _log.warning(message)
                return step, found
            skipped.append(problem)
        if misfit:  # then the config is wrong rather than the checkpoints
            raise misfit
        if skipped:
            raise UserError(f"none of the checkpoints {steps} in {self._directory} can be read")
        return None

    def _numbered(self) -> list[int]:
        """The steps after which entries of the folder are named, in order."""
        names = [path.name for path in self._directory.iterdir() if path.name.isdecimal()]
        return sorted(int(name) for name in names if str(int(name)) == name)

    def _is_whole(self, step: int) -> bool:
        """True if the entry of a step has all parts of a checkpoint."""
        try:
            return all((self._directory / str(step) / item).is_dir() for item in self._handlers)
        except OSError:  # no permission to read it
            return False

    def _set_aside_after(self, step: int) -> None:
        """Moves the checkpoints of later steps and all incomplete ones out of the folder, in process 0."""
        for other in self._numbered() if process_index() == 0 else ():
            if other <= step and self._is_whole(other):
                continue
            path = self._directory / str(other)
            target = self._directory.with_name("damaged_checkpoints") / f"{other}-{time.time_ns()}"
            try:
                target.parent.mkdir(exist_ok=True)
                path.rename(target)
            except OSError as error:
                raise UserError(f"{path} is in the way and cannot be moved to {target}: {error.strerror}") from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises errors of the file system as `UserError`."""
        try:
            yield
        except Exception as error:  # each layer of orbax raises other types
            self._failed = True
            if another_has_gone(error):
                raise
            whole = [step for step in self._numbered() if self._is_whole(step)]
            raise UserError(
                f"cannot write a checkpoint to {self._directory}: {_reason(error)}; the checkpoints {whole} are intact"
            ) from error

    def restore_data(self, step: int) -> dict[str, Any]:
        """The state of the data iterator in the checkpoint of a step."""
        return self._restore_item(step, "data", ocp.args.JsonRestore())

    def _saved_config(self, step: int) -> dict[str, Any]:
        return self._restore_item(step, "config", ocp.args.JsonRestore())

    def restore_state(self, step: int, plan: StatePlan) -> TrainState:
        """The state in the checkpoint of a step, laid out as `plan` says.

        Raises:
            UserError: naming the first array that is missing, has another shape or is unknown to the model.
        """
        return self._restore_exactly(step, plan, plan.shapes, plan.shardings, self._stored(step))

    def restore_model(self, step: int, plan: StatePlan) -> Model:
        """The model in the checkpoint of a step, without its optimiser; raises what `restore_state` does."""
        stored = parameters(self._stored(step))
        return self._restore_exactly(step, plan, plan.shapes.model, plan.shardings.model, stored)

    def _restore_exactly(self, step: int, plan: StatePlan, shapes: Any, shardings: Any, stored: StoredArrays) -> Any:
        wanted = with_shardings(shapes, shardings)
        sources = exact_sources(plan.config, wanted, stored, f"checkpoint {step}")
        return with_leaves(shapes, read_stacked(wanted, sources, partial(self._restore_arrays, step), {}))

    def _restore_arrays(self, step: int, wanted: Wanted) -> dict[str, jax.Array]:
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
        return self._restore_item(step, "state", arguments)

    def _stored(self, step: int) -> StoredArrays:
        return current_names(self._manager.item_metadata(step)["state"].tree, self._saved_config(step))

    def _restore_item(self, step: int, item: str, arguments: ocp.args.CheckpointArgs) -> Any:
        # Not through the manager: it would wait for processes whose read has failed.
        return self._handlers[item].restore(epath.Path(self._directory) / str(step) / item, args=arguments)

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shape of every array of a checkpoint, by its name by layer."""
        return {name: array.shape for name, array in self._stored(step).items()}

    def check(self) -> None:
        """Raises a `UserError` if the save in progress has failed; does not wait for it."""
        if self._in_progress and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is on disk; raises a `UserError` if it cannot be written."""
        with self._writing():
            self._manager.wait_until_finished()
        self._in_progress = False

    def close(self) -> None:
        """Waits as `wait` does and releases the writer; raises no error twice."""
        with suppress(Exception) if self._failed else self._writing():
            self._manager.close()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _reason(error: Exception) -> str:
    """The operating system's reason for an error, or else the first line of its message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's
    return os.strerror(int(code[1])) if code else _first_line(error)
