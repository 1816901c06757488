"""Compares our logits with transformers' for the same files and inputs, in float32."""

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Shaped

from switchjax.config import Config, MeshConfig, UserError
from switchjax.interop.config import read_json
from switchjax.interop.convert import config_of, load_huggingface
from switchjax.interop.families import family_of
from switchjax.models.model import Model
from switchjax.parallel.mesh import make_mesh

TOLERANCE = 1e-4
"""Largest difference of two logits, over the largest logit if that exceeds 1; reordered float32 sums differ by less."""

Arrays = dict[str, Shaped[np.ndarray, "B ..."]]
_ROWS, _LENGTH = 4, 48


@dataclass(frozen=True)
class Comparison:
    """A comparison of the logits of two models for the same inputs."""

    name: str
    """The setting of this comparison."""
    difference: float
    """Largest difference of two logits, without padding."""
    largest: float
    """Largest absolute value of a logit."""
    dropped: float
    """Fraction of choices that found no slot in our model."""

    @property
    def equal(self) -> bool:
        """True if the difference is within the tolerance, which NaN is not."""
        return self.difference <= TOLERANCE * max(1.0, self.largest)

    def __str__(self) -> str:
        dropped = f", {self.dropped:.0%} of choices dropped" if self.dropped else ""
        return (
            f"{self.name}: logits differ by at most {self.difference:.1e}; the largest is {self.largest:.1f}{dropped}"
        )


def compare(folder: Path) -> list[Comparison]:
    """Compares logits for padded random inputs; for a Switch Transformer, also with so few slots that tokens drop.

    Raises:
        UserError: if torch or transformers is not installed, or the folder holds no readable model.
    """
    config = config_of(folder)
    module = import_transformers()
    single = dataclasses.replace(config.model, dtype="float32", param_dtype="float32")
    config = dataclasses.replace(config, model=single, mesh=MeshConfig())
    found = [_compare(folder, config, "as configured", module)]
    if config.moe.expert_capacity:
        few = max(1, _LENGTH // (2 * config.moe.num_experts))
        tight = dataclasses.replace(config, moe=dataclasses.replace(config.moe, expert_capacity=few))
        found.append(_compare(folder, tight, f"with expert_capacity={few}", module))
    return found


def import_transformers() -> ModuleType:
    """Imports transformers; raises a `UserError` if it or torch is not installed, which are optional."""
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise UserError(
            f"this command needs torch and transformers ({error}): pip install torch transformers"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def random_inputs(config: Config, seed: int = 0) -> Arrays:
    """A batch for our model: rows of random ids with padding on the right, or random images."""
    rng, model = np.random.default_rng(seed), config.model
    if model.family == "vision":
        shape = (_ROWS, model.image_size, model.image_size, model.image_channels)
        return {"images": rng.integers(0, 256, shape).astype(np.uint8), "labels": np.zeros(_ROWS, np.int32)}
    names = {"encoder": "encoder_tokens", "decoder": "decoder_inputs"}
    batch: Arrays = {}
    for stack in model.stacks:
        lengths = rng.integers(_LENGTH // 2, _LENGTH + 1, _ROWS)
        real = np.arange(_LENGTH)[None] < lengths[:, None]
        ids = rng.integers(1, model.vocab_size, real.shape)
        batch |= {names[stack]: np.where(real, ids, 0).astype(np.int32), f"{stack}_segments": real.astype(np.int32)}
    return batch


def their_inputs(batch: Arrays) -> Arrays:
    """The same batch with transformers' names and scaling."""
    if "images" in batch:
        scaled = batch["images"].astype(np.float32) / 127.5 - 1
        return {"pixel_values": scaled.transpose(0, 3, 1, 2)}
    decoder = {"input_ids": batch["decoder_inputs"], "attention_mask": batch["decoder_segments"]}
    if "encoder_tokens" not in batch:
        return decoder
    encoder = {"input_ids": batch["encoder_tokens"], "attention_mask": batch["encoder_segments"]}
    return encoder | {f"decoder_{name}": values for name, values in decoder.items()}


def real_targets(batch: Arrays) -> Bool[np.ndarray, "B T"]:
    """A mask that is False at padding, whose logits do not count."""
    return np.ones((_ROWS, 1), bool) if "images" in batch else batch["decoder_segments"] > 0


def _compare(folder: Path, config: Config, name: str, module: ModuleType) -> Comparison:
    batch = random_inputs(config)
    theirs = _their_logits(folder, config, their_inputs(batch), module)
    ours, dropped = our_logits(load_huggingface(folder, config, make_mesh(MeshConfig(), jax.devices()[:1])), batch)
    real = real_targets(batch)
    difference, largest = np.abs(ours - theirs)[real], np.abs(theirs)[real]
    return Comparison(name, float(difference.max()), float(largest.max()), dropped)


def our_logits(model: Model, batch: Arrays) -> tuple[Float[np.ndarray, "B T V"], float]:
    """The logits in evaluation, and the fraction of choices that found no slot."""
    with jax.default_matmul_precision("highest"):
        logits, reports = jax.jit(lambda model, batch: model(batch, None))(model, batch)
    counted = [report.metrics for report in reports.values() if report.metrics is not None]
    routed = sum(float(np.sum(metrics.routed)) for metrics in counted)
    dispatched = sum(float(np.sum(metrics.dispatched)) for metrics in counted)
    return np.asarray(logits), 1 - dispatched / routed if routed else 0.0


def _their_logits(folder: Path, config: Config, inputs: Arrays, module: ModuleType) -> Float[np.ndarray, "B T V"]:
    import torch

    changes: dict[str, Any] = {"expert_capacity": config.moe.expert_capacity} if config.moe.expert_capacity else {}
    model = load_transformers(folder, module, changes)
    tensors = {key: torch.from_numpy(values) for key, values in inputs.items()}
    with torch.no_grad():
        logits = model(**{k: v.long() if v.dtype == torch.int32 else v for k, v in tensors.items()}).logits
    return logits.numpy().reshape(len(logits), -1, logits.shape[-1])


def load_transformers(folder: Path, module: ModuleType, changes: dict[str, Any]) -> Any:
    """Loads a folder into transformers' own model, in float32, with `changes` to its config.json."""
    import torch

    theirs = read_json(folder / "config.json")
    model_class = getattr(module, family_of(theirs).architecture)
    with tempfile.TemporaryDirectory() as scratch:
        # A folder of links with a changed config.json: not all of transformers' classes accept changes as arguments.
        for path in folder.iterdir():
            (Path(scratch) / path.name).symlink_to(path.absolute())
        (Path(scratch) / "config.json").unlink()
        (Path(scratch) / "config.json").write_text(json.dumps(theirs | changes))
        return model_class.from_pretrained(scratch, dtype=torch.float32, local_files_only=True).eval()
