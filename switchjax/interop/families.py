"""The families that are exchanged with transformers, by its `model_type`."""

from collections.abc import Mapping
from typing import Any

from switchjax.config import Config, UserError, check_choice
from switchjax.interop.family import Family
from switchjax.interop.mixtral import MIXTRAL
from switchjax.interop.switch import SWITCH
from switchjax.interop.t5 import T5
from switchjax.interop.vit import VIT

HUGGINGFACE_FAMILIES: dict[str, Family] = {"t5": T5, "switch_transformers": SWITCH, "mixtral": MIXTRAL, "vit": VIT}


def family_of(theirs: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        UserError: if `model_type` is unknown or the model has another output head than the converted one.
    """
    kind = str(theirs.get("model_type"))
    check_choice("config.json: model_type", kind, HUGGINGFACE_FAMILIES)
    family = HUGGINGFACE_FAMILIES[kind]
    architectures = theirs.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise UserError(f"config.json: architectures={architectures} is not supported, only {family.architecture}")
    return family


def model_type_of(config: Config) -> str:
    """transformers' `model_type` for our model.

    Raises:
        UserError: if transformers has no such model.
    """
    model = config.model
    if model.family == "encoder_decoder":
        return "switch_transformers" if model.has_experts else "t5"
    types = {"decoder_only": "mixtral", "vision": "vit"}
    if model.family not in types:
        raise UserError(f"transformers has no model like model.family={model.family}")
    return types[model.family]
