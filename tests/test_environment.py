"""The environment of the shell scripts, with a Python that writes down what it is asked for instead of doing it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# As a venv's interpreter it is a copy of itself. `broken` in the folder makes pip fail.
PYTHON = """#!/bin/sh
echo "$*" >>"{log}"
case "$*" in
  "-c "*) echo "{path}" ;;
  --version) echo "Python 3.12.{patch}" ;;
  "-m venv "*) mkdir -p .venv/bin && cp "{path}" .venv/bin/python ;;
  "-m pip "*) test ! -e broken ;;
esac
"""


class Sandbox:
    """A copy of the shell scripts in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a project"
        shutil.copytree(ROOT / "scripts", self.root / "scripts", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        (self.root / "constraints.txt").touch()
        (self.root / "setup.cfg").touch()
        self.log = folder / "log"
        self.path = folder / "bin"
        self.path.mkdir()
        self.add_python("python3.11")

    def add_python(self, name: str, patch: int = 1) -> Path:
        path = self.path / name
        path.write_text(PYTHON.format(log=self.log, path=path, patch=patch))
        path.chmod(0o755)
        return path

    def run(self, command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=cwd or self.root,
            env={"PATH": f"{self.path}:/usr/bin:/bin", "HOME": str(self.path.parent)} | environment,
            capture_output=True,
            text=True,
        )

    def steps(self, command: str, **environment: str) -> list[str]:
        """What `command` has made: `venv`, or what pip installed."""
        self.log.write_text("")
        done = self.run(command, **environment)
        assert done.returncode == 0, done.stderr
        made = [line for line in self.log.read_text().splitlines() if line.startswith("-m ")]
        return ["venv" if line.startswith("-m venv") else line.rpartition(" ")[2] for line in made]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


ENVIRONMENT = ". scripts/environment.sh"


def test_made_once_and_extended_in_place(sandbox: Sandbox) -> None:
    assert sandbox.steps(ENVIRONMENT) == ["venv", "."]
    assert sandbox.steps(ENVIRONMENT) == []
    assert sandbox.steps(f"{ENVIRONMENT} dev") == [".[dev]"]
    assert sandbox.steps(ENVIRONMENT) == []
    assert sandbox.steps(f"{ENVIRONMENT} notebooks") == [".[dev,notebooks]"]
    assert sandbox.steps(f"{ENVIRONMENT} notebooks,dev") == []


def test_the_arguments_of_a_script_are_no_extras(sandbox: Sandbox) -> None:
    assert sandbox.steps("scripts/quickstart.sh runs/other") == ["venv", "."]


def test_is_on_the_path(sandbox: Sandbox) -> None:
    done = sandbox.run(f"{ENVIRONMENT}; command -v python")
    assert done.stdout == f"{sandbox.root}/.venv/bin/python\n"


@pytest.mark.parametrize("file", ["setup.cfg", "constraints.txt"])
def test_changed_requirements_make_a_new_one(sandbox: Sandbox, file: str) -> None:
    sandbox.steps(f"{ENVIRONMENT} dev")
    (sandbox.root / file).write_text("changed")
    assert sandbox.steps(ENVIRONMENT) == ["venv", "."]


def test_another_python_makes_a_new_one(sandbox: Sandbox) -> None:
    sandbox.steps(ENVIRONMENT)
    other = sandbox.add_python("python3.12")
    assert sandbox.steps(ENVIRONMENT) == []
    assert sandbox.steps(ENVIRONMENT, PYTHON=str(other)) == ["venv", "."]
    sandbox.add_python("python3.12", patch=2)
    assert sandbox.steps(ENVIRONMENT) == ["venv", "."]


def test_another_folder_makes_a_new_one(sandbox: Sandbox) -> None:
    sandbox.steps(ENVIRONMENT)
    sandbox.root = sandbox.root.rename(sandbox.root.with_name("moved"))
    assert sandbox.steps(ENVIRONMENT) == ["venv", "."]


@pytest.mark.parametrize("extras", ["", "dev"])
def test_an_interrupted_install_is_made_anew(sandbox: Sandbox, extras: str) -> None:
    if extras:
        sandbox.steps(ENVIRONMENT)
    (sandbox.root / "broken").touch()
    assert sandbox.run(f"{ENVIRONMENT} {extras}").returncode == 1
    (sandbox.root / "broken").unlink()
    assert sandbox.steps(ENVIRONMENT) == ["venv", "."]


def test_a_candidate_that_does_not_run_is_passed_over(sandbox: Sandbox) -> None:
    shim = sandbox.path / "python3.12"
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    assert sandbox.steps(ENVIRONMENT) == ["venv", "."]


@pytest.mark.parametrize("python", ["no-such-python", "/bin/false"])
def test_an_unusable_PYTHON_is_an_error(sandbox: Sandbox, python: str) -> None:
    done = sandbox.run(ENVIRONMENT, PYTHON=python)
    assert done.returncode == 1
    assert done.stderr == f"error: PYTHON={python} is not a Python 3.11 or newer with ensurepip and venv\n"
    assert not (sandbox.root / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "workdir"), [("", "a project/runs/quickstart"), ("my/run", "elsewhere/my/run"), ("/{}/run", "run")]
)
def test_the_quickstarts_workdir(sandbox: Sandbox, arguments: str, workdir: str) -> None:
    parent = sandbox.root.parent
    (parent / "elsewhere").mkdir()
    script = sandbox.root / "scripts" / "quickstart.sh"
    done = sandbox.run(f"'{script}' {arguments.format(str(parent)[1:])}", cwd=parent / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert f"--workdir={parent / workdir}/switch" in sandbox.log.read_text()
    assert os.path.isdir(parent / workdir)
