"""The bundle: the same bytes for the same sources, whole, small, cached."""

from __future__ import annotations

import bz2
import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import trainer
from launcher.bundle import LIMIT, archive, build
from launcher.errors import LaunchError

PACKAGE = Path(trainer.__file__).parent


def test_a_tree_copied_elsewhere_in_another_order_by_another_user_gives_the_same_bytes(
    tmp_path: Path,
) -> None:
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    random.Random(0).shuffle(files)
    mask = os.umask(0o077)
    try:
        for index, path in enumerate(files):
            target = tmp_path / "elsewhere" / "trainer" / path.relative_to(PACKAGE)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            target.chmod(0o700 if index % 2 else 0o640)
            os.utime(target, (index, index))
    finally:
        os.umask(mask)
    copy = tmp_path / "elsewhere" / "trainer"
    (copy / "__pycache__").mkdir(exist_ok=True)
    (copy / "__pycache__" / "loop.cpython-399.pyc").write_bytes(b"x")
    (copy / ".#loop.py").write_text("an editor's lock")
    assert archive(copy) == archive(PACKAGE)
    one, two = build(tmp_path / "one"), build(tmp_path / "two", copy)
    assert (one.sha256, one.bytes) == (two.sha256, two.bytes)


def test_every_python_here_makes_the_same_archive(tmp_path: Path) -> None:
    """What an interpreter does with `tarfile` must not change the name."""
    script = (
        "import sys, hashlib, pathlib; from launcher.bundle import archive;"
        "print(sys.version_info[:2] >= (3, 10)"
        " and hashlib.sha256(archive(pathlib.Path(sys.argv[1]))).hexdigest())"
    )
    expected = hashlib.sha256(archive(PACKAGE)).hexdigest()
    root = str(PACKAGE.parent)
    found = {}
    for name in (sys.executable, "python3.10", "python3.11", "python3.12", "python3.13"):
        if shutil.which(name) is None:
            continue
        done = subprocess.run(
            [name, "-c", script, str(PACKAGE)], capture_output=True, text=True, check=False,
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": "7"},
        )  # fmt: skip
        if done.returncode == 0:  # else it is a shim without an interpreter behind it
            found[name] = done.stdout.strip()
    assert found[sys.executable] == expected
    assert set(found.values()) == {expected}


def test_it_holds_every_module_of_the_trainer_and_nothing_else(tmp_path: Path) -> None:
    made = build(tmp_path)
    data = bz2.decompress(made.path.read_bytes())
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (made.sha256, made.bytes)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
    assert all(
        (m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) == (0, 0, 0, "", "", 0o644) and m.isfile()
        for m in members
    )
    wanted = {f"trainer/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")}
    assert {member.name for member in members} >= wanted
    assert {Path(m.name).suffix for m in members} <= {".py", ".txt"}


def test_it_is_smaller_than_300_kb_and_named_by_its_content(tmp_path: Path) -> None:
    made = build(tmp_path)
    assert made.path == tmp_path / "bundles" / f"{made.sha256}.tar.bz2"
    assert made.path.stat().st_size < 300_000


def test_a_changed_source_changes_the_name(tmp_path: Path) -> None:
    package = _package(tmp_path, b"a = 1\n")
    before = build(tmp_path, package)
    (package / "module.py").write_bytes(b"a = 2\n")
    after = build(tmp_path, package)
    assert before.sha256 != after.sha256
    assert before.path.exists()


def test_a_whole_cached_bundle_is_kept(tmp_path: Path) -> None:
    package = _package(tmp_path, b"a = 1\n")
    made = build(tmp_path, package)
    before = made.path.stat()
    assert build(tmp_path, package) == made
    after = made.path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "header", "block"])
def test_a_damaged_cached_bundle_is_built_again(tmp_path: Path, damage: str) -> None:
    package = _package(tmp_path, b"a = 1\n" * 100)
    made = build(tmp_path, package)
    good = made.path.read_bytes()
    middle = len(good) // 2
    made.path.write_bytes(
        {
            "cut": good[:middle],
            "flipped": good[:middle] + bytes([good[middle] ^ 0xFF]) + good[middle + 1 :],
            "empty": b"",
            "other": bz2.compress(b"something else"),
            "header": b"xx" + good[2:],
            "block": good[:10] + b"\xff" * 20 + good[30:],  # no type of deflate block
        }[damage]
    )
    assert build(tmp_path, package) == made
    assert bz2.decompress(made.path.read_bytes()) == archive(package)
    assert [path.name for path in made.path.parent.iterdir()] == [made.path.name]


def test_a_trainer_that_grew_too_large_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    package = _package(tmp_path, random.Random(0).randbytes(LIMIT + 1000))
    with pytest.raises(LaunchError, match=f"bundle is .* bytes; at most {LIMIT}"):
        build(tmp_path, package)
    assert not (tmp_path / "bundles").exists()


def test_a_home_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bundles").write_text("a file where a folder should be")
    with pytest.raises(LaunchError, match=r"cannot write .*bundles") as caught:
        build(tmp_path, _package(tmp_path, b""))
    assert "\n" not in str(caught.value)


def _package(folder: Path, content: bytes) -> Path:
    package = folder / "tree" / "trainer"
    package.mkdir(parents=True)
    (package / "module.py").write_bytes(content)
    return package
