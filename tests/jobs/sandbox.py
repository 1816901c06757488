"""A repository of its own for the scripts that start jobs, with programs that write down how they are called."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]

# NUL ends an argument, a line break after it the call.
_RECORD = """#!/bin/bash
printf '%s\\0' {name} "$@" >>"{log}"
echo >>"{log}"
"""


class Sandbox:
    """A committed copy of the shell scripts, and a PATH that begins with the programs of `add`."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log, self._path = folder / "repository", folder / "log", folder / "bin"
        self._path.mkdir()
        shutil.copytree(ROOT / "scripts", self.root / "scripts", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        (self.root / ".gitignore").write_text("/build/\n/runs/\n")
        author = {f"GIT_{who}_{what}": "a" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        done = self.run("git init --quiet && git add . && git commit --quiet --message=a", **author)
        assert done.returncode == 0, done.stderr

    def add(self, name: str, script: str = "") -> None:
        """A program that records its call, then runs `script`."""
        path = self._path / name
        path.write_text(_RECORD.format(name=name, log=self.log) + script)
        path.chmod(0o755)

    def run(
        self, command: str, cwd: Path | None = None, home: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a line of bash in the repository."""
        path = f"{self._path}{os.pathsep}/usr/bin{os.pathsep}/bin"
        return subprocess.run(
            ["bash", "-c", command],
            cwd=cwd or self.root,
            env={"PATH": path, "HOME": str(home or self.root.parent)} | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        """What has been called since the last time that this was asked."""
        lines = self.log.read_text() if self.log.exists() else ""
        self.log.write_text("")
        return [call.split("\0") for call in lines.split("\0\n")[:-1]]


def write_job(path: Path, settings: Mapping[str, str]) -> Path:
    """A file of settings for scripts/tpu/job.sh."""
    path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    return path
