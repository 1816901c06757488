"""Parameters and the tensors that hold their parts: only needed tensors are read, unknown ones are refused."""

import jax
import numpy as np
import pytest

from switchjax.config import UserError
from switchjax.interop.family import MATRIX, VECTORS
from switchjax.interop.layouts import Layout
from switchjax.interop.mapping import Entry, match
from switchjax.interop.t5 import t5_table
from switchjax.interop.tensors import TensorFolder
from switchjax.models.families import build
from switchjax.models.parameter_paths import ParameterPath
from switchjax.parallel.sharding import named_leaves
from tests.models.examples import changed

EXPERTS = Entry(
    ParameterPath("decoder/{layer}/ff/experts/w_in", (1, 3), 3),
    "layer.{layer}.expert.{expert}",
    Layout(MATRIX, {}),
    (2, 3, 4, 5),
    None,
)


class Recorder(TensorFolder):
    """Tensors in memory, with a record of those that were read."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self.tensors = tensors
        self.was_read: list[str] = []

    def read(self, name: str) -> np.ndarray:
        self.was_read.append(name)
        return self.tensors[name]


def test_a_part_is_gathered_from_no_other_tensors_than_its_own() -> None:
    whole = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    source = Recorder(dict(EXPERTS.split(jax.numpy.asarray(whole))))
    assert list(source.tensors)[:4] == ["layer.1.expert.0", "layer.1.expert.1", "layer.1.expert.2", "layer.3.expert.0"]
    assert EXPERTS.their_shape == (5, 4) == source.tensors["layer.3.expert.2"].shape
    index = (slice(1, 2), slice(0, 2), slice(None), slice(2, 5))
    part = EXPERTS.read(source, index, np.float32)
    np.testing.assert_array_equal(part, whole[index])
    assert source.was_read == ["layer.3.expert.0", "layer.3.expert.1"]


def test_rows_of_a_vocabulary_go_by_their_ids() -> None:
    entry = Entry(
        ParameterPath("embedding/vectors"), "shared", Layout(VECTORS, {}), (3, 2), np.array([1, 2, 0], np.int32)
    )
    ours = np.arange(6, dtype=np.float32).reshape(3, 2)
    theirs = dict(entry.split(jax.numpy.asarray(ours)))
    np.testing.assert_array_equal(theirs["shared"], ours[[2, 0, 1]])
    back = entry.read(Recorder(theirs), (slice(None), slice(None)), np.float32)
    np.testing.assert_array_equal(back, ours)


def test_parameters_without_a_place_are_named() -> None:
    config = changed(pattern=("moe_dense",))
    shapes = named_leaves(jax.eval_shape(lambda: build(config, jax.random.key(0))))
    with pytest.raises(UserError, match=r"no place for .*decoder/0/extra"):
        match(config, t5_table(config.model), shapes)
