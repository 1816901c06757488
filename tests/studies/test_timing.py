"""Programs take turns, and ratios are of measurements of the same round."""

from switchjax.studies.timing import Ratio, interleaved_seconds


def test_programs_are_run_in_turn_after_a_warm_up() -> None:
    calls: list[str] = []
    programs = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    interleaved_seconds(programs, repeats=2)
    assert calls == ["a", "b"] * 3
    calls.clear()
    seconds = interleaved_seconds(programs, repeats=2, warm_up=False)
    assert calls == ["a", "b"] * 2
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_a_ratio_is_taken_round_by_round() -> None:
    # A machine that is ten times slower in the second round changes nothing.
    assert Ratio.of([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == Ratio(2.0, 2.0, 2.0)
    assert str(Ratio.of([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)) == "3.00 (2.00 to 4.00)"
    assert Ratio.of([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5)
