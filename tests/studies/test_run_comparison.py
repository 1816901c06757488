"""The table of two runs from their workdirs."""

import json
from pathlib import Path

import pytest

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig, UserError
from switchjax.studies.run_comparison import compare_runs

MODEL = {"vocab_size": 32, "d_model": 8, "d_ff": 16, "num_heads": 2, "d_head": 4}
LAYERS = {"num_encoder_layers": 2, "num_decoder_layers": 2}


def write_run(workdir: Path, pattern: tuple[str, ...], curve: dict[int, float], tokens: int = 100) -> Path:
    """Writes the workdir of a complete run with these held-out losses."""
    workdir.mkdir()
    config = Config(
        model=ModelConfig(**MODEL, **LAYERS, pattern=pattern),
        moe=MoEConfig(num_experts=4),
        data=DataConfig(vocabulary_size=16, num_sentinels=4),
    )
    (workdir / "config.json").write_text(config.to_json())
    records = [{"kind": "evaluate", "step": step, "neg_log_perplexity": -loss} for step, loss in curve.items()]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    last = -curve[max(curve)]
    evaluation = {"neg_log_perplexity": last, "neg_log_perplexity/tales": last - 1, "target_tokens": tokens}
    evaluation |= {"fraction_tokens_dropped": 0.0312} if "moe" in pattern else {}
    summary = {"steps": max(curve), "tokens_per_second": 1234.5, "evaluation": evaluation}
    (workdir / "summary.json").write_text(json.dumps(summary))
    return workdir


def rows(table: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {name: values for name, *values in cells}


def test_the_table_holds_sizes_losses_and_the_step_of_passing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "switch", ("dense", "moe"), {50: 6.0, 100: 4.9, 150: 4.5})
    base = write_run(tmp_path / "dense", ("dense", "dense"), {50: 6.1, 100: 5.5, 150: 5.0})
    table = rows(compare_runs(run, base))
    # 2 MoE layers of 4 experts of 2 x 8 x 16, and 2 routers of 8 x 4; the rest is common.
    total, active = (
        int(table[name][0].replace(",", "")) for name in ("parameters, total", "parameters, active for a token")
    )
    dense = int(table["parameters, total"][1].replace(",", ""))
    assert total == dense + 2 * 3 * 256 + 2 * 32
    assert active == dense + 2 * 32
    assert table["held-out loss, nats a token"] == ["4.500", "5.000"]
    assert table["... tales"] == ["5.500", "6.000"]
    assert table["step at which it passed dense's final loss"] == ["100", "-"]
    assert table["fraction of tokens dropped in evaluation"] == ["3.1 %", "-"]


def test_a_run_that_never_passes_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "switch", ("moe",), {50: 6.0})
    base = write_run(tmp_path / "dense", ("dense",), {50: 5.0})
    assert rows(compare_runs(run, base))["step at which it passed dense's final loss"] == ["not yet", "-"]


def test_runs_on_different_text_are_not_compared(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ("moe",), {50: 6.0}, tokens=100)
    base = write_run(tmp_path / "b", ("dense",), {50: 6.0}, tokens=99)
    with pytest.raises(UserError, match="not evaluated on the same"):
        compare_runs(run, base)


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ("moe",), {50: 6.0})
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="holds no complete run"):
        compare_runs(run, run)
