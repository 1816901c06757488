"""Invalid settings of decoding are refused."""

import pytest

from switchjax.config import DecodingConfig, UserError


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", "beem", r"decoding\.method: unknown value 'beem' \(did you mean 'beam'\?\)"),
        ("max_new_tokens", 0, r"decoding\.max_new_tokens must be positive, got 0"),
        ("temperature", 0.0, r"decoding\.temperature must be positive, got 0\.0"),
        ("num_beams", 0, r"decoding\.num_beams must be positive, got 0"),
        ("top_k", -1, r"decoding\.top_k must not be negative, got -1"),
        ("top_p", 0.0, r"decoding\.top_p must be in \(0, 1\], got 0\.0"),
        ("top_p", 1.5, r"decoding\.top_p must be in \(0, 1\], got 1\.5"),
        ("length_penalty", -0.5, r"decoding\.length_penalty must not be negative, got -0\.5"),
    ],
)
def test_it_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        DecodingConfig(**{field: value})
