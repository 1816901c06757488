"""The scripts: `--help` at once, and bad input in one line with a non-zero exit, never a traceback."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from switchjax import command
from switchjax.config import Config, DataConfig, TrainConfig, UserError

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_an_example(script: str) -> None:
    done = run(f"scripts/{script}", "--help")
    assert done.returncode == 0, done.stderr
    assert f"python scripts/{script}" in done.stdout
    assert not done.stderr


def test_help_lists_the_configs_and_their_sizes() -> None:
    shown = run("scripts/train.py", "--help").stdout
    assert "configs/switch.py: Switch Transformer" in shown
    assert "base-256" in shown
    for path in (ROOT / "configs").glob("*.py"):
        _, _, after = shown.partition(f"configs/{path.name}: ")
        assert after.splitlines()[1].startswith("      Sizes: "), path


def test_help_names_config_files_that_are_half_written_too(tmp_path: Path) -> None:
    for name, text in {"broken": "def get_config(:", "silent": "SIZES = {}", "binary": "\0"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    shown = command._summarize_configs(tmp_path)
    assert f"{tmp_path.name}/broken.py: (cannot be read: SyntaxError)" in shown
    assert f"{tmp_path.name}/silent.py: (no description)" in shown
    assert f"{tmp_path.name}/binary.py: (cannot be read: " in shown
    assert f"{tmp_path.name}/gone.py: (cannot be read: FileNotFoundError)" in shown


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_only_help_reads_all_config_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_summarize_configs", None)
    command.parse_with_config(command.make_parser(None), [f"--config={ROOT}/configs/quickstart.py:runlocal"])


@pytest.mark.parametrize("script", ["train", "evaluate", "generate", "compare", "benchmark", "convert"])
def test_help_starts_no_jax(script: str) -> None:
    done = run("-X", "importtime", f"scripts/{script}.py", "--help")
    assert done.returncode == 0
    assert "| jax" not in done.stderr


QUICKSTART = "--config=configs/quickstart.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.py", "--config=configs/quickstrt.py"], "no config file configs/quickstrt.py (did you mean"),
        (["train.py"], "the following arguments are required: --config"),
        (["generate.py"], "the following arguments are required: --prompt"),
        (["train.py", f"{QUICKSTART}:swich"], "unknown value 'swich' (did you mean 'switch'?)"),
        (["train.py", QUICKSTART, "--config.model.d_modell=3"], "unknown config key 'model.d_modell' (did you mean"),
        (["train.py", QUICKSTART, "--config.modle.d_model=3"], "unknown config key 'modle' (did you mean 'model'?)"),
        (["train.py", QUICKSTART, "--config.model.d_model=wide"], "invalid literal for int"),
        (["train.py", QUICKSTART, "--config.moe.train_capacity_factor=0.0"], "must be positive"),
        (["train.py", QUICKSTART, "--surprise=1"], "surprise"),
        (["train.py", QUICKSTART, "surprise"], "unexpected argument surprise"),
        (["train.py", QUICKSTART, "--config.mesh.expert=3"], "mesh.expert * mesh.model must divide 8"),
        (["train.py", QUICKSTART, "--config.data.batch_size=12"], "the nearest multiples are 8 and 16"),
        (["train.py", QUICKSTART, "--config.moe.num_experts=6"], "does not divide over mesh.expert=4"),
        (["train.py", QUICKSTART, "--config.moe.router=swich"], "unknown value 'swich' (did you mean 'switch'?)"),
        (["train.py", QUICKSTART, "--config.moe.num_selected_experts=2"], "moe.router=switch selects 1 expert(s)"),
        (["train.py", QUICKSTART, "--config.moe.router=expert_choice"], "would let a decoder see the future"),
        (
            ["train.py", QUICKSTART, "--config.moe.router=top_k", "--config.moe.options.normalise_gates=False"],
            "unknown config key 'moe.options.normalise_gates' (did you mean 'normalize_gates'?)",
        ),
        (
            ["train.py", QUICKSTART, "--config.moe.loss_weights.load_loss=0.1"],
            "moe.loss_weights: router switch has no loss 'load_loss' (did you mean 'load_balance_loss'?)",
        ),
        (["evaluate.py"], "cannot read"),
        (["generate.py", "--prompt=x"], "cannot read"),
        (["generate.py", "--prompt=x", f"--seed={2**64}"], "--seed must be in [0, 2**32), got 18446744073709551616"),
        (["compare.py", "--baseline=nowhere"], "cannot read"),
        (["benchmark.py", "decode"], "cannot read"),
        (["benchmark.py", "routers", "--config=configs/quickstrt.py"], "no config file configs/quickstrt.py"),
        (["benchmark.py", "families", "--config=configs/quickstrt.py"], "no config file configs/quickstrt.py"),
        (["benchmark.py", "decode", "--repeats=0"], "argument --repeats: must be positive, got 0"),
        (["train.py", QUICKSTART, "--config.train.trace_steps=-1"], "train.trace_steps must not be negative, got -1"),
        (["benchmark.py", "faults", "--config=configs/quickstrt.py"], "no config file configs/quickstrt.py"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    script, *flags = arguments
    done = run(f"scripts/{script}", *flags, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert.py"], "the following arguments are required: TASK"),
        (
            ["convert.py", "from-hf", "nowhere", "run"],
            "nowhere holds neither model.safetensors nor model.safetensors.index.json",
        ),
        (["convert.py", "to-hf", "nowhere", "folder"], "cannot read nowhere/config.json"),
        (["convert.py", "to-hf", "nowhere", "folder", "--surprise"], "unrecognized arguments: --surprise"),
        (
            ["convert.py", "check", "nowhere"],
            "nowhere holds neither model.safetensors nor model.safetensors.index.json",
        ),
        (["convert.py", "check", "tests/interop/fixtures/vit"], "pip install torch transformers"),
        (
            ["convert.py", "from-hf", "tests/interop/fixtures/vit", "nowhere", "--config.model.d_modle=8"],
            "unknown config key 'model.d_modle' (did you mean 'd_model'?)",
        ),
        (["benchmark.py", "layer", "--tokens=3000"], "--tokens=3000 is no multiple of the 2048 tokens of a group"),
        (["benchmark.py", "layer", "--tokens=0"], "--tokens=0 is no multiple of the 2048 tokens of a group"),
        (["benchmark.py", "step", "--write=tests"], "--write: cannot read tests (Is a directory)"),
        (
            ["benchmark.py", "decode", "--new_tokens=8", "--workdir=run", "--repeats", "3", "--write=README.md"],
            "no lines '<!-- python scripts/benchmark.py decode --workdir run --new_tokens 8 -->'",
        ),
        (
            ["benchmark.py", "step", "--config=t5.py", "--config.data.batch_size=8", "--write=README.md"],
            "no lines '<!-- python scripts/benchmark.py step --config t5.py --config.data.batch_size=8 -->'",
        ),
        (
            ["benchmark.py", "plan", "--workdir=elsewhere", "--write=CHANGELOG.md"],
            "no lines '<!-- python scripts/benchmark.py plan -->'",
        ),
    ],
)
def test_scripts_without_a_workdir_refuse_bad_input_in_one_line(arguments: list[str], message: str) -> None:
    script, *flags = arguments
    done = run(f"scripts/{script}", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def get_config(:", "SyntaxError: invalid syntax (config.py, line 1)"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("get_config = nothing", "NameError: name 'nothing' is not defined"),
        ("get_config = lambda: 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_broken_config_file_is_one_line(tmp_path: Path, code: str, message: str) -> None:
    path = tmp_path / "config.py"
    path.write_text(code)
    done = run("scripts/train.py", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stderr == f"error: {path}: {message}\n"


def test_a_runs_config_repeats_it_with_values_replaced(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    saved = Config(data=DataConfig(corpora=("kjv", "austen"), rates=(0.5, 0.5)), train=TrainConfig(seed=3))
    path.write_text(saved.to_json())
    assert command.load_config(str(path)) == saved
    longer = dataclasses.replace(saved, train=TrainConfig(seed=3, steps=7))
    assert command.load_config(str(path), ["--config.train.steps=7"]) == longer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the config {path}: No such file or directory"),
        ("{", "{path}: the config is not valid JSON: "),
        ('{"architectures": []}', "{path}: unknown config key 'architectures'"),
    ],
)
def test_a_json_file_that_is_no_config_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as raised:
        command.load_config(str(path))
    assert str(raised.value).startswith(message.format(path=path))


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
@pytest.mark.parametrize("form", ["file", "json"])
def test_options_and_loss_weights_are_set_by_name_whatever_the_config_names(tmp_path: Path, form: str) -> None:
    source = "configs/quickstart.py"
    if form == "json":
        source = str(tmp_path / "config.json")
        Path(source).write_text(command.load_config("configs/quickstart.py").to_json())
    moe = command.load_config(
        source,
        [
            "--config.moe.router=sigmoid",
            "--config.moe.options.bias_update_rate=0.01",
            "--config.moe.options.normalize_gates=False",
            "--config.moe.loss_weights.router_z_loss=1e-3",
            "--config.moe.num_experts=16",
        ],
    ).moe
    assert (moe.router, moe.num_experts) == ("sigmoid", 16)
    assert moe.options == {"bias_update_rate": 0.01, "normalize_gates": False}
    assert moe.loss_weights["router_z_loss"] == 1e-3
    words = command.load_config(source, ["--config.moe.router=hash", "--config.moe.options.hash_table=balanced"])
    assert words.moe.options == {"hash_table": "balanced"}
