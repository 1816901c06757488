"""A decoder as EleutherAI's lm-evaluation-harness takes it (`pip install "switchjax[lm-eval]"`).

with jax.set_mesh(mesh):
    lm_eval.simple_evaluate(HarnessModel(load_pretrained(workdir, mesh)), tasks=["lambada_openai"])
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from switchjax.config import DecodingConfig, UserError
from switchjax.inference.pretrained import Pretrained
from switchjax.inference.scoring import log_likelihoods, score
from switchjax.inference.text import complete_tokens

try:
    from lm_eval.api.model import LM
except ImportError:
    raise UserError('the harness needs lm-eval: pip install "switchjax[lm-eval]"') from None


class HarnessModel(LM):
    """The three questions that the harness asks; each request holds its texts in `args`.

    Args:
        pretrained: a decoder.
        rows: of a batch.
        length: most tokens of a row; 0: as in training.
        seed: of sampling, where a task asks for it.

    Raises:
        UserError: for an encoder-decoder.
    """

    def __init__(self, pretrained: Pretrained, rows: int = 8, length: int = 0, seed: int = 0):
        super().__init__()
        if pretrained.config.model.family == "encoder_decoder":
            raise UserError("the harness is for decoders, but this run has model.family=encoder_decoder")
        self._pretrained, self._rows, self._seed = pretrained, rows, seed
        self._length = length or pretrained.config.data.decoder_length

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each continuation, and whether greedy decoding writes it."""
        scores = score(self._pretrained, [request.args for request in requests], self._rows, self._length)
        return [(found.log_prob, found.is_greedy) for found in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability (nats) of each text by itself."""
        texts = [request.args[0] for request in requests]
        return [found.log_prob for found in log_likelihoods(self._pretrained, texts, self._rows, self._length)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What follows each context, up to the first of the request's `until`.

        Raises:
            UserError: for arguments that decoding does not have, or new tokens that leave no room for a context.
        """
        groups: dict[DecodingConfig, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(decoding_config(request.args[1]), []).append(place)
        answers: dict[int, str] = {}
        for decoding, places in groups.items():
            for first in range(0, len(places), self._rows):
                some = places[first : first + self._rows]
                contexts = [requests[place].args[0] for place in some]
                answers |= zip(some, self._complete(contexts, decoding, places[first]), strict=True)
        return [_until(answers[place], request.args[1].get("until")) for place, request in enumerate(requests)]

    def _complete(self, contexts: list[str], decoding: DecodingConfig, draw: int) -> list[str]:
        """One batch, always of the same shape; of a context that is too long, the beginning is left out."""
        room = self._length - decoding.max_new_tokens
        if room < 1:
            raise UserError(f"rows of {self._length} tokens leave no room for {decoding.max_new_tokens} new ones")
        ids = [self._pretrained.vocabulary.encode(context)[-room:] for context in contexts]
        ids += [[]] * (self._rows - len(ids))
        key = jax.random.fold_in(jax.random.key(self._seed), draw)
        return complete_tokens(self._pretrained, ids, room, decoding, key)[: len(contexts)]


def decoding_config(arguments: Mapping[str, Any]) -> DecodingConfig:
    """The decoding that a request's arguments ask for, greedy and 256 tokens where they say nothing.

    Raises:
        UserError: for an argument that decoding does not have.
    """
    arguments = {name: value for name, value in arguments.items() if name != "until"}
    tokens, sampled = arguments.pop("max_gen_toks", 256), arguments.pop("do_sample", False)
    unknown = arguments.keys() - {"temperature", "top_k", "top_p"}
    if unknown:
        raise UserError(f"decoding has no {', '.join(sorted(unknown))}, which a task of the harness asks for")
    if not sampled or arguments.get("temperature") == 0:
        return DecodingConfig(max_new_tokens=tokens)
    return DecodingConfig("sample", tokens, **arguments)


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """`text` up to the first of `stops`."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.partition(stop)[0] if stop else text
    return text
