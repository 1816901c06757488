"""Decoders: GPT-style and Mixtral-style transformers, GLaM, and LSTM language models, dense or with experts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from switchjax.config import Config, UserError
from switchjax.models.attention import positions_in_segments, sinusoids
from switchjax.models.cache import Cache
from switchjax.models.inputs import Reports
from switchjax.models.layers import Embedding, learned_positions, predict, untied_output
from switchjax.models.model import Batch, Model, below, embed, token_arrays
from switchjax.models.stack import Stack
from switchjax.parallel.sharding import constrain


class LanguageModel(Model):
    """The probability of each token given those before it in its packed sequence.

    The layers that `model.pattern` names make it a transformer or an LSTM.
    """

    def __init__(self, config: Config, key: PRNGKeyArray):
        self.config = model = config.model
        embedding_key, position_key, decoder_key, logits_key = jax.random.split(key, 4)
        self.embedding = Embedding(model, embedding_key)
        self.positions = learned_positions(model, model.max_length, position_key)
        self.decoder = Stack(config, config.layers("decoder"), causal=True, cross=False, key=decoder_key)
        self.logits = untied_output(model, logits_key)

    def __call__(self, batch: Batch, key: PRNGKeyArray | None) -> tuple[Float[Array, "B T V"], Reports]:
        """Logits of the token that follows each of `decoder_inputs`, and the decoder's reports."""
        tokens, segments = batch["decoder_inputs"], batch["decoder_segments"]
        x = self._embed(tokens, positions_in_segments(segments), tokens.shape[1])
        x, reports = self.decoder(x, tokens, segments, key)
        return predict(x, self.embedding, self.logits), below("decoder", reports)

    def start(self, batch: Batch, max_length: int) -> Cache:
        """The cache for the rows of `batch`, with room for `max_length` tokens per row.

        Raises:
            UserError: if the model has learned fewer positions.
        """
        learned = self.config.max_length
        if self.positions is not None and max_length > learned:
            raise UserError(f"{max_length} tokens exceed the model.max_length={learned} positions learned")
        return self.decoder.start(batch["decoder_inputs"].shape[0], max_length)

    def extend(
        self, tokens: Int[Array, "B L"], token_mask: Bool[Array, "B L"], cache: Cache
    ) -> tuple[Float[Array, "B L V"], Cache]:
        """Logits of the token after each of L further tokens per row, and the new cache; see `Stack.extend`."""
        x = self._embed(tokens, cache.positions(tokens.shape[1]), cache.max_length)
        x, cache = self.decoder.extend(x, tokens, token_mask, cache)
        return predict(x, self.embedding, self.logits), cache

    def _embed(self, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], count: int) -> Float[Array, "B L D"]:
        """Token vectors, plus the vectors of their positions (below `count`) if the model adds those."""
        x = embed(self.embedding, tokens)
        if self.config.positions not in ("learned", "sinusoidal"):
            return x
        table = sinusoids(count, x.shape[2]) if self.positions is None else self.positions[...]
        return constrain(x + jnp.take(table.astype(x.dtype), positions, axis=0), "batch", "length", "embed")

    @staticmethod
    def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        """Token ids and segments; segment 0 is padding."""
        names = ("decoder_inputs", "decoder_targets", "decoder_segments")
        return token_arrays(config.data.batch_size, config.data.decoder_length, *names)

    @staticmethod
    def targets(batch: Batch) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """The next token at each position."""
        return batch["decoder_targets"], batch["decoder_segments"]

    def segments(self, batch: Batch) -> dict[str, Int[Array, "B _"]]:
        """The segments of the decoder."""
        return {"decoder": batch["decoder_segments"]}
