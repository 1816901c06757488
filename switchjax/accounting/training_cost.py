"""What a training run costs, by a paper's own formula."""

from switchjax.config import Config


def meta_training_flops(config: Config, tokens: float = 300e9) -> float:
    """The formula by which Artetxe et al. 2021 print the training cost of their dense and MoE models, in FLOPs.

    `96 T l h^2 (1 + s / 6h + V / 16lh)`, with the forward pass computed twice (activations are recomputed), and
    `64 T h^2` for each expert beyond the first of the l/2 MoE layers.

    Args:
        config: a decoder with feed-forward layers of width 4 h.
        tokens: T.
    """
    model = config.model
    layers, width, length = model.num_decoder_layers, model.d_model, config.data.decoder_length
    share = 1 + length / (6 * width) + model.vocab_size / (16 * layers * width)
    dense = 96 * tokens * layers * width**2 * share
    extra = config.moe.num_selected_experts - 1 if model.has_experts else 0
    return dense + layers / 2 * extra * 64 * tokens * width**2
