"""The encoder-decoder: T5, and with MoE layers the Switch Transformer, GShard and ST-MoE."""

import jax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from switchjax.config import Config
from switchjax.models.attention import attention_mask
from switchjax.models.cache import Cache
from switchjax.models.inputs import CrossInputs, Reports
from switchjax.models.layers import Embedding, predict, split_key, untied_output
from switchjax.models.model import Batch, Model, below, embed, token_arrays
from switchjax.models.stack import Stack


class EncoderDecoder(Model):
    """T5 (Raffel et al. 2020), whose stacks both have the layers of `model.pattern`."""

    def __init__(self, config: Config, key: PRNGKeyArray):
        self.config = config.model
        model = config.model
        embedding_key, encoder_key, decoder_key, logits_key = jax.random.split(key, 4)
        self.embedding = Embedding(model, embedding_key)
        self.encoder = Stack(config, config.layers("encoder"), causal=False, cross=False, key=encoder_key)
        self.decoder = Stack(config, config.layers("decoder"), causal=True, cross=True, key=decoder_key)
        self.logits = untied_output(model, logits_key)

    def __call__(self, batch: Batch, key: PRNGKeyArray | None) -> tuple[Float[Array, "B T V"], Reports]:
        """Logits of the decoder's targets, and the reports of both stacks."""
        encoder_key, decoder_key = split_key(key, 2)
        encoded, encoder_reports = self.encode(batch["encoder_tokens"], batch["encoder_segments"], encoder_key)
        logits, decoder_reports = self.decode(
            encoded, batch["encoder_segments"], batch["decoder_inputs"], batch["decoder_segments"], decoder_key
        )
        return logits, below("encoder", encoder_reports) | below("decoder", decoder_reports)

    def encode(
        self, tokens: Int[Array, "B L"], segments: Int[Array, "B L"], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L D"], Reports]:
        """The encoder's output for each token, and its reports."""
        return self.encoder(embed(self.embedding, tokens), tokens, segments, key)

    def decode(
        self,
        encoded: Float[Array, "B M D"],
        encoded_segments: Int[Array, "B M"],
        tokens: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B L V"], Reports]:
        """Logits of the token that follows each of `tokens`, and the decoder's reports."""
        cross = CrossInputs(encoded, attention_mask(segments, encoded_segments))
        x, reports = self.decoder(embed(self.embedding, tokens), tokens, segments, key, cross)
        return predict(x, self.embedding, self.logits), reports

    def start(self, batch: Batch, max_length: int) -> Cache:
        """The decoder's cache for the encoder's inputs in `batch`, with room for `max_length` tokens per row."""
        tokens, segments = batch["encoder_tokens"], batch["encoder_segments"]
        encoded, _ = self.encode(tokens, segments, None)
        return self.decoder.start(tokens.shape[0], max_length, encoded, segments)

    def extend(
        self, tokens: Int[Array, "B L"], token_mask: Bool[Array, "B L"], cache: Cache
    ) -> tuple[Float[Array, "B L V"], Cache]:
        """Logits of the token after each of L further tokens per row, and the new cache; see `Stack.extend`."""
        x, cache = self.decoder.extend(embed(self.embedding, tokens), tokens, token_mask, cache)
        return predict(x, self.embedding, self.logits), cache

    @staticmethod
    def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        """Token ids and segments; segment 0 is padding."""
        data, decoder = config.data, ("decoder_inputs", "decoder_targets", "decoder_segments")
        encoder = token_arrays(data.batch_size, data.encoder_length, "encoder_tokens", "encoder_segments")
        return encoder | token_arrays(data.batch_size, data.decoder_length, *decoder)

    @staticmethod
    def targets(batch: Batch) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """The decoder's targets."""
        return batch["decoder_targets"], batch["decoder_segments"]

    def segments(self, batch: Batch) -> dict[str, Int[Array, "B _"]]:
        """The segments of both stacks."""
        return {stack: batch[f"{stack}_segments"] for stack in ("encoder", "decoder")}
