"""Errors name the key, the value and a suggestion."""

import pytest

from switchjax.config.checks import UserError, check_choice, check_fraction, check_positive, check_seed, suggest


def test_the_closest_name_is_suggested_or_all_are_listed() -> None:
    assert suggest("swich", ["switch", "hash"]) == " (did you mean 'switch'?)"
    assert suggest("zzz", ["switch", "hash"]) == " (known: switch, hash)"


@pytest.mark.parametrize("value", [0, -1, -0.5])
def test_what_is_not_positive_is_refused(value: float) -> None:
    check_positive("moe", {"group_size": 1, "rate": 0.1})
    with pytest.raises(UserError, match=rf"^moe\.rate must be positive, got {value}$"):
        check_positive("moe", {"group_size": 1, "rate": value})


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_what_is_no_fraction_is_refused(value: float) -> None:
    check_fraction("moe", {"rate": 0.0, "jitter": 0.99})
    with pytest.raises(UserError, match=rf"^moe\.rate must be in \[0, 1\), got {value}$"):
        check_fraction("moe", {"rate": value})


@pytest.mark.parametrize("value", [-1, 2**32])
def test_what_is_no_seed_is_refused(value: int) -> None:
    check_seed("train.seed", 2**32 - 1)
    with pytest.raises(UserError, match=rf"^train\.seed must be in .*, got {value}$"):
        check_seed("train.seed", value)


def test_what_is_no_choice_is_refused() -> None:
    check_choice("model.norm", "rms", ["rms", "layer"])
    with pytest.raises(UserError, match=r"^model\.norm: unknown value 'rsm' \(did you mean 'rms'\?\)$"):
        check_choice("model.norm", "rsm", ["rms", "layer"])
