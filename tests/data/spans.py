"""The oracle of span corruption: what it did, undone."""

import numpy as np

from switchjax.data.objective import TokenIds


def restore(inputs: TokenIds, targets: TokenIds, lowest_sentinel: int) -> TokenIds:
    """The tokens that were corrupted; ids from `lowest_sentinel` on are sentinels, each of which has an answer."""
    positions = np.flatnonzero(targets[:-1] >= lowest_sentinel)
    spans = dict(zip(targets[positions].tolist(), np.split(targets[:-1], positions)[1:], strict=True))
    return np.concatenate(
        [np.array([token]) if token < lowest_sentinel else spans.pop(int(token))[1:] for token in inputs[:-1]]
    )
