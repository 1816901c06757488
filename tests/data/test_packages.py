import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from switchjax.data.packages import Downloads, Package, SourceUnavailable, read_members


def tgz(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("package/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


MEMBERS = {"package/b.txt": b"b", "package/a.txt": b"a", "package/c.py": b"raise SystemExit"}


@pytest.mark.parametrize(("make", "name"), [(tgz, "x.tgz"), (wheel, "x.whl")])
def test_reads_matching_files_in_order(tmp_path: Path, make: object, name: str) -> None:
    archive = make(tmp_path / name, MEMBERS)  # type: ignore[operator]
    members = read_members(archive, r"package/.*\.txt")
    assert list(members.items()) == [("package/a.txt", b"a"), ("package/b.txt", b"b")]
    with pytest.raises(SourceUnavailable, match="holds no file"):
        read_members(archive, "nothing")


@pytest.mark.parametrize(("make", "name"), [(tgz, "x.tgz"), (wheel, "x.whl")])
def test_hostile_paths_write_nothing(tmp_path: Path, make: object, name: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    archive = make(inner / name, {"../../escaped.txt": b"x", "/tmp/escaped.txt": b"y"})  # type: ignore[operator]
    before = sorted(tmp_path.rglob("*"))
    members = read_members(archive, r".*\.txt")
    assert sorted(members.values()) == [b"x", b"y"]
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/escaped.txt").exists()


@pytest.mark.parametrize("name", ["x.tgz", "x.whl"])
def test_a_broken_archive_is_a_missing_source(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no archive")
    with pytest.raises(SourceUnavailable, match=f"{name} is not a readable archive"):
        read_members(tmp_path / name, ".*")


@pytest.mark.parametrize("manager", ["debian", "npm"])
def test_a_missing_package_manager_is_a_missing_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manager: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceUnavailable, match=rf"cannot fetch the {manager} package some: there is no"):
        Downloads(tmp_path).fetch(Package(manager, "some"))


def test_no_network_is_a_missing_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SourceUnavailable, match=r"cannot fetch the pypi package some-package: .*some-package"):
        Downloads(tmp_path).fetch(Package("pypi", "some-package"))
