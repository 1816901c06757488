"""The encoder-decoder: T5, and with MoE layers the Switch Transformer."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from switchjax.config import Config
from switchjax.models.attention import attention_mask
from switchjax.models.layers import Embedding, kernel, split_key
from switchjax.models.stack import CrossInputs, Stack
from switchjax.moe.layer import RoutingSums
from switchjax.parallel.sharding import constrain

Batch = dict[str, Int[Array, "B L"]]
"""encoder_tokens, encoder_segments, decoder_inputs, decoder_targets, decoder_segments; segment 0 is padding."""


class EncoderDecoder(nnx.Module):
    """T5 (Raffel et al. 2020) with feed-forward layers after `model.pattern` in both stacks."""

    def __init__(self, config: Config, key: PRNGKeyArray):
        self.config = config.model
        model = config.model
        embedding_key, encoder_key, decoder_key, logits_key = jax.random.split(key, 4)
        self.embedding = Embedding(model, embedding_key)
        self.encoder = Stack(config, model.num_encoder_layers, causal=False, cross=False, key=encoder_key)
        self.decoder = Stack(config, model.num_decoder_layers, causal=True, cross=True, key=decoder_key)
        shape, axes = (model.d_model, model.vocab_size), ("embed", "vocab")
        untied = not model.tie_embeddings
        self.logits = kernel(logits_key, shape, axes, model.param_dtype, scale=1.0) if untied else None

    def __call__(self, batch: Batch, key: PRNGKeyArray | None) -> tuple[Float[Array, "B L V"], dict[str, RoutingSums]]:
        """Logits of the decoder's targets, and routing sums of the stacks that have MoE layers.

        Args:
            batch: token ids and segments.
            key: for dropout and routing noise; None in evaluation.
        """
        encoder_key, decoder_key = split_key(key, 2)
        encoded, encoder_sums = self.encode(batch["encoder_tokens"], batch["encoder_segments"], encoder_key)
        logits, decoder_sums = self.decode(
            encoded, batch["encoder_segments"], batch["decoder_inputs"], batch["decoder_segments"], decoder_key
        )
        sums = {"encoder": encoder_sums, "decoder": decoder_sums}
        return logits, {name: values for name, values in sums.items() if values is not None}

    def encode(
        self, tokens: Int[Array, "B L"], segments: Int[Array, "B L"], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L D"], RoutingSums | None]:
        """The encoder's output for each token, with its routing sums."""
        return self.encoder(self._embed(tokens), tokens, segments, key)

    def decode(
        self,
        encoded: Float[Array, "B M D"],
        encoded_segments: Int[Array, "B M"],
        tokens: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B L V"], RoutingSums | None]:
        """Logits of the token that follows each of `tokens`, with the decoder's routing sums."""
        cross = CrossInputs(encoded, attention_mask(segments, encoded_segments))
        x, sums = self.decoder(self._embed(tokens), tokens, segments, key, cross)
        if self.logits is None:
            return self.embedding.logits(x), sums
        return x @ self.logits[...].astype(x.dtype), sums

    def _embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return constrain(self.embedding(tokens), "batch", "length", "embed")


def routed_tokens(batch: Batch) -> dict[str, Int[Array, ""]]:
    """Tokens that pass through each stack's MoE layers: what their routing sums are divided by."""
    return {stack: (batch[f"{stack}_segments"] > 0).sum() for stack in ("encoder", "decoder")}


def build(config: Config, key: PRNGKeyArray) -> EncoderDecoder:
    """The model that `config.model.family` names, freshly initialised."""
    return FAMILIES[config.model.family](config, key)


FAMILIES = {"encoder_decoder": EncoderDecoder}
