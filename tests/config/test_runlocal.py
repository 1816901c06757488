"""The small form of a system keeps its architecture and fits a machine of 8 emulated devices."""

import dataclasses

from switchjax.config import Config, ModelConfig, MoEConfig
from switchjax.config.runlocal import runlocal


def test_it_is_small_and_keeps_what_makes_the_architecture() -> None:
    model = ModelConfig(
        d_model=4096, num_encoder_layers=24, num_decoder_layers=24, activation="geglu", dtype="bfloat16"
    )
    large = Config(model=model, moe=MoEConfig(router="st_moe", num_selected_experts=2, num_experts=64))
    small = runlocal(large)
    assert (small.model.d_model, small.model.num_encoder_layers, small.model.dtype) == (64, 2, "float32")
    assert (small.model.activation, small.moe.router, small.moe.num_selected_experts) == ("geglu", "st_moe", 2)
    assert (small.mesh.expert, small.mesh.emulated_devices, small.train.steps) == (4, 8, 2)
    assert small.optimizer == large.optimizer


def test_a_config_may_ask_for_sizes_of_its_own() -> None:
    small = runlocal(Config(), model={"num_decoder_layers": 4}, moe={"num_experts": 16})
    assert (small.model.num_decoder_layers, small.moe.num_experts) == (4, 16)


def test_without_experts_no_axis_is_for_them_and_images_are_those_of_the_small_corpus() -> None:
    dense = dataclasses.replace(Config().model, pattern=("dense",))
    assert runlocal(dataclasses.replace(Config(), model=dense)).mesh.expert == 1
    vision = dataclasses.replace(Config().model, family="vision", positions="learned")
    data = dataclasses.replace(Config().data, objective="classification")
    small = runlocal(dataclasses.replace(Config(), model=vision, data=data))
    assert (small.model.image_size, small.model.num_classes, small.data.corpora) == (28, 10, ("fashion_mnist",))
