"""switchjax: mixture-of-experts systems of the Switch Transformer's family, in JAX and Flax.

Letters in shapes, the same everywhere:
    B batch, L length, G groups, S tokens per group, D model, F feed-forward, H heads, A dimension of a head,
    E experts, C expert capacity, K selected experts, V vocabulary.
"""

__version__ = "0.1.0"
