"""The comparison with transformers: run if it is installed, and the message if it is not."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from switchjax.config import UserError
from switchjax.interop.check import Comparison, compare, import_transformers, random_inputs, their_inputs
from switchjax.interop.config import write_config
from switchjax.interop.convert import config_of, huggingface_tensors, load_huggingface
from switchjax.interop.tensors import write_tensors
from tests.interop.examples import FIXTURES, MODELS, SHAPES, one_device, random_folder


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install torch transformers"):
        import_transformers()


@pytest.mark.parametrize("name", MODELS)
def test_live(name: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = compare(FIXTURES / name)
    assert all(comparison.equal for comparison in found), found
    assert len(found) == (2 if "switch" in name else 1)


@pytest.mark.parametrize("name", [*MODELS, *SHAPES])
def test_live_after_the_way_there_and_back(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = FIXTURES / name
    if name in SHAPES:
        source = tmp_path / "source"
        random_folder(name, source, deviation=0.3)
    config, target = config_of(source), tmp_path / "target"
    target.mkdir()
    write_tensors(target, huggingface_tensors(load_huggingface(source, config, one_device()), config), 10**9)
    (target / "config.json").write_text(json.dumps(write_config(config)))
    found = compare(target)
    assert all(comparison.equal for comparison in found), found
    model = getattr(transformers, write_config(config)["architectures"][0])
    _, loaded = model.from_pretrained(target, output_loading_info=True)
    assert not any(loaded[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loaded


def test_equal_means_within_the_tolerance_of_the_largest_logit() -> None:
    assert Comparison("", 1e-4, 0.5, 0.0).equal
    assert not Comparison("", 1.1e-4, 0.5, 0.0).equal
    assert Comparison("", 1e-3, 10.0, 0.0).equal
    assert not Comparison("", float("nan"), 1.0, 0.0).equal


@pytest.mark.parametrize("name", ["switch", "mixtral", "vit"])
def test_inputs_are_padded_on_the_right_and_named_as_there(name: str) -> None:
    batch = random_inputs(config_of(FIXTURES / name))
    theirs = their_inputs(batch)
    if name == "vit":
        assert theirs["pixel_values"].shape == (4, 2, 12, 12)
        assert np.abs(theirs["pixel_values"]).max() <= 1
        np.testing.assert_allclose(
            theirs["pixel_values"][1, 0, 2, 3] * 127.5 + 127.5, batch["images"][1, 2, 3, 0], rtol=1e-5
        )
        return
    prefixes = ("", "decoder_") if name == "switch" else ("",)
    assert set(theirs) == {f"{prefix}{kind}" for prefix in prefixes for kind in ("input_ids", "attention_mask")}
    for prefix in prefixes:
        mask = theirs[f"{prefix}attention_mask"]
        assert (np.diff(mask, axis=1) <= 0).all()
        assert 0 < mask.mean() < 1
        assert not theirs[f"{prefix}input_ids"][mask == 0].any()
