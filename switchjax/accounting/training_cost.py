"""The cost of a training run by a paper's own formula."""

from switchjax.config import Config


def meta_training_flops(config: Config, tokens: float = 300e9) -> float:
    """Training FLOPs of a decoder with feed-forward width 4 h on T = `tokens`, as Artetxe et al. 2021 print them.

    `96 T l h^2 (1 + s / 6h + V / 16lh)`, which counts the forward pass twice for recomputed activations, plus
    `64 T h^2` for each selected expert after the first in each of the l / 2 MoE layers.
    """
    model = config.model
    layers, width, length = model.num_decoder_layers, model.d_model, config.data.decoder_length
    share = 1 + length / (6 * width) + model.vocab_size / (16 * layers * width)
    dense = 96 * tokens * layers * width**2 * share
    extra = config.moe.num_selected_experts - 1 if model.has_experts else 0
    return dense + layers / 2 * extra * 64 * tokens * width**2
