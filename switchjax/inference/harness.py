"""Evaluates a decoder with EleutherAI's lm-evaluation-harness (`pip install "switchjax[lm-eval]"`).

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
    """Answers the harness's three kinds of requests; each request holds its texts in `args`.

    Batches have `rows` rows of `length` tokens; 0 means the training length. `seed` is for tasks that sample.

    Raises:
        UserError: for an encoder-decoder.
    """

    def __init__(self, pretrained: Pretrained, rows: int = 8, length: int = 0, seed: int = 0):
        super().__init__()
        if pretrained.config.model.family == "encoder_decoder":
            raise UserError("the harness needs a decoder, but this run has model.family=encoder_decoder")
        self._pretrained, self._rows, self._seed = pretrained, rows, seed
        self._length = length or pretrained.config.data.decoder_length

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The log-probability (nats) of each continuation, and whether greedy decoding would write it."""
        scores = score(self._pretrained, [request.args for request in requests], self._rows, self._length)
        return [(found.log_prob, found.is_greedy) for found in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-probability (nats) of each text without context."""
        texts = [request.args[0] for request in requests]
        return [found.log_prob for found in log_likelihoods(self._pretrained, texts, self._rows, self._length)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continues each context until the first string of the request's `until`.

        Raises:
            UserError: for an argument that decoding does not support, or if the new tokens leave no room for a context.
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
        """Completes one batch, always of the same shape; cuts the beginning of a context that is too long."""
        room = self._length - decoding.max_new_tokens
        if room < 1:
            raise UserError(f"rows of {self._length} tokens leave no room for {decoding.max_new_tokens} new ones")
        ids = [self._pretrained.vocabulary.encode(context)[-room:] for context in contexts]
        ids += [[]] * (self._rows - len(ids))
        key = jax.random.fold_in(jax.random.key(self._seed), draw)
        return complete_tokens(self._pretrained, ids, room, decoding, key)[: len(contexts)]


def decoding_config(arguments: Mapping[str, Any]) -> DecodingConfig:
    """The decoding that a request's arguments describe; default: greedy with 256 tokens.

    Raises:
        UserError: for an argument that decoding does not support.
    """
    arguments = {name: value for name, value in arguments.items() if name != "until"}
    tokens, sampled = arguments.pop("max_gen_toks", 256), arguments.pop("do_sample", False)
    unknown = arguments.keys() - {"temperature", "top_k", "top_p"}
    if unknown:
        raise UserError(f"a task of the harness asks for {', '.join(sorted(unknown))}, which decoding does not support")
    if not sampled or arguments.get("temperature") == 0:
        return DecodingConfig(max_new_tokens=tokens)
    return DecodingConfig("sample", tokens, **arguments)


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """`text` up to the first of `stops`."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.partition(stop)[0] if stop else text
    return text
