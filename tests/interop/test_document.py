"""Runs the commands of docs/huggingface.md unchanged, on tiny models with the same names."""

import dataclasses
import importlib.util
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

from configs.quickstart import get_config
from switchjax.config import Config, UserError, load_workdir_config
from switchjax.interop.convert import to_huggingface
from tests.interop.examples import random_workdir

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/huggingface.md").read_text(), re.DOTALL)
COMMANDS = "".join(BLOCKS).replace("\\\n", "").splitlines()


@pytest.mark.slow
def test_every_command_of_the_document_runs(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"vocab_size": 352, "d_model": 16, "d_ff": 32, "num_heads": 2, "d_head": 8}
    sizes |= {"num_encoder_layers": 2, "num_decoder_layers": 2}
    lengths = {"encoder_length": 128, "decoder_length": 32, "batch_size": 16}
    data = dataclasses.replace(tiny.data, **lengths)
    for name in ("switch", "dense"):
        config = Config.from_dict(get_config(name))
        model = dataclasses.replace(config.model, **sizes)
        config = dataclasses.replace(config, model=model, data=data, evaluate=tiny.evaluate)
        (tmp_path / "runs/quickstart").mkdir(parents=True, exist_ok=True)
        random_workdir(config, tmp_path / "runs/quickstart" / name)
    to_huggingface(tmp_path / "runs/quickstart/switch", tmp_path / "models/switch-base-8")
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) == 6
    for command in COMMANDS:
        python, script, *arguments = shlex.split(command, comments=True)
        assert python == "python", command
        main = runpy.run_path(str(ROOT / script))["main"]
        if arguments[0] == "check" and importlib.util.find_spec("transformers") is None:
            with pytest.raises(UserError, match=r"pip install torch transformers"):
                main(arguments)
            continue
        main(arguments)
        if arguments[0] == "from-hf":  # a tiny model is imported as one for a large corpus
            imported = dataclasses.replace(load_workdir_config(arguments[2]), data=data, evaluate=tiny.evaluate)
            Path(arguments[2], "config.json").write_text(imported.to_json())
