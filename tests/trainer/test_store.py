"""The store over real files: atomic, once, and clear about what is wrong."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.disk import file_size_limit, killed_at
from trainer.store import (
    DiskFull,
    FileStore,
    NotFound,
    StoreError,
    atomic_write,
    fsync_dir,
    open_store,
    remove_unfinished,
)

parts = st.text(st.sampled_from("ab.-é "), min_size=1, max_size=3).filter(
    lambda part: part not in (".", "..")
)
#: Values lie one folder deep under names that are no values themselves.
keys = st.tuples(parts.map(lambda p: f"d{p}"), parts.map(lambda p: f"f{p}")).map("/".join)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["put", "once", "delete"]), keys, st.binary(max_size=9))))
def test_a_store_behaves_like_a_dictionary(acts: list[tuple[str, str, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, model = open_store(folder), dict[str, bytes]()
        for act, key, data in acts:
            if act == "put":
                store.put_bytes(key, data)
                model[key] = data
            elif act == "once":
                assert store.create_once(key, data) == (key not in model)
                model.setdefault(key, data)
            else:
                store.delete(key)
                model.pop(key, None)
        assert store.list() == sorted(model)
        for key, data in model.items():
            assert store.get_bytes(key) == data and store.exists(key)
            assert store.checksum(key) == hashlib.sha256(data).hexdigest()
            assert store.list(key[:3]) == sorted(k for k in model if k.startswith(key[:3]))


@pytest.mark.parametrize("prefix", ["", "file://", "file://localhost", "FILE://"])
def test_paths_and_file_uris_name_the_same_store(tmp_path: Path, prefix: str) -> None:
    folder = tmp_path / "with space"
    FileStore(folder).put_bytes("a/b", b"x")
    name = str(folder) if not prefix else prefix + str(folder).replace(" ", "%20")
    store = open_store(name)
    assert store.get_bytes("a/b") == b"x"
    assert store.local_path("a/b") == folder / "a" / "b"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("ftp://h/x", "no store for ftp://; allowed: a local path, file://, gs://, s3://"),
        ("gs://", "gs://: names no bucket; write gs://BUCKET/FOLDER"),
        ("s3:///x", "names no bucket; write s3://BUCKET/FOLDER"),
        ("file://host/x", "write file:///absolute/path"),
        ("file://", "write file:///absolute/path"),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_line(uri: str, words: str) -> None:
    with pytest.raises(StoreError) as raised:
        open_store(uri)
    assert words in str(raised.value) and uri in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["", "/etc/x", "../x", "a/../../x", "a//b", ".", "a/", "a\0b"])
def test_keys_never_leave_the_store(tmp_path: Path, key: str) -> None:
    store = FileStore(tmp_path / "store")
    for act in (lambda: store.put_bytes(key, b"x"), lambda: store.get_bytes(key)):
        with pytest.raises(StoreError, match="must be relative"):
            act()
    assert list(tmp_path.iterdir()) == []


def test_a_listing_stays_inside_the_store(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with pytest.raises(StoreError, match="must be relative"):
        FileStore(tmp_path / "store").list("../")


def test_a_store_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "none")
    assert store.list() == store.list("a/b") == [] and not store.exists("a")
    store.delete("a")
    for act in (lambda: store.get_bytes("a"), lambda: store.checksum("a")):
        with pytest.raises(NotFound, match=r"cannot read a in .*none: it does not exist"):
            act()


def test_one_of_many_writers_creates_the_record(tmp_path: Path) -> None:
    store, won = FileStore(tmp_path), []
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        if store.create_once("journal/00000001.json", bytes([number]) * 10_000):
            won.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get_bytes("journal/00000001.json") == bytes(won) * 10_000
    assert len(list((tmp_path / "journal").iterdir())) == 1


def test_a_file_is_put_whole(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3 << 20))
    store = FileStore(tmp_path / "store")
    store.put_file("deep/er/copy", source)
    assert store.get_bytes("deep/er/copy") == source.read_bytes()
    with pytest.raises(NotFound, match=r"cannot read .*absent: it does not exist"):
        store.put_file("copy", tmp_path / "absent")


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=rf"cannot write {tmp_path}/file/key: ") as raised:
        FileStore(tmp_path).put_bytes("file/key", b"")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("way", ["put_bytes", "create_once", "put_file"])
def test_a_full_disk_leaves_the_old_value_and_says_what_was_wanted(
    tmp_path: Path, way: str
) -> None:
    store, data = FileStore(tmp_path / "store"), b"x" * 100_000
    store.put_bytes("old", b"small")
    source = tmp_path / "source"
    source.write_bytes(data)
    key = "new" if way == "create_once" else "old"
    with file_size_limit(4096), pytest.raises(DiskFull) as raised:
        getattr(store, way)(key, source if way == "put_file" else data)
    line = str(raised.value)
    assert f"{tmp_path}/store/{key} needs 100000 bytes" in line and line.startswith("disk full")
    assert store.get_bytes("old") == b"small"
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["old"]


@pytest.mark.parametrize("way", ["put_bytes", "create_once"])
def test_killed_at_any_call_a_value_is_whole_or_as_before(way: str) -> None:
    # A process without torch forks in a millisecond.
    script = (
        "import sys, tempfile\n"
        "from pathlib import Path\n"
        "from tests.trainer.disk import killed_at\n"
        "from trainer.store import FileStore, remove_unfinished\n"
        "k, seen = 0, []\n"
        "while True:\n"
        "    with tempfile.TemporaryDirectory() as folder:\n"
        "        store = FileStore(folder)\n"
        f"        if '{way}' == 'put_bytes': store.put_bytes('d/k', b'old')\n"
        f"        killed = killed_at(lambda: store.{way}('d/k', b'new' * 999), k)\n"
        "        value = store.get_bytes('d/k') if store.exists('d/k') else b''\n"
        "        assert store.list() == (['d/k'] if value else [])\n"
        "        remove_unfinished(Path(folder, 'd'))\n"
        "        assert len(list(Path(folder).glob('d/*'))) == bool(value)\n"
        "    seen.append({b'': 'none', b'old': 'old', b'new' * 999: 'new'}[value])\n"
        "    if not killed: break\n"
        "    k += 1\n"
        "print(*seen)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = done.stdout.split()
    before = "old" if way == "put_bytes" else "none"
    assert len(seen) > 5 and seen[0] == before and seen[-1] == "new"
    assert seen == sorted(seen, key=lambda state: state == "new")


def test_only_the_temporary_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    names = {f".tmp-{child.pid}-00000000", f".tmp-{os.getppid()}-00000000", ".tmp-notes", "value"}
    for name in names:
        (tmp_path / name).write_text("x")
    remove_unfinished(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == names - {f".tmp-{child.pid}-00000000"}


def test_text_is_written_atomically_into_new_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.json"
    atomic_write(path, "é")
    atomic_write(path, b"second")
    fsync_dir(path.parent)
    assert path.read_bytes() == b"second" and len(list(path.parent.iterdir())) == 1


def test_killed_at_really_kills(tmp_path: Path) -> None:
    """The tool of the tests above: a plain write is torn by it."""
    path = tmp_path / "plain"

    def careless() -> None:
        path.write_text("whole")
        path.with_name("second").write_text("x")

    assert killed_at(careless, 1) and path.exists() and not path.with_name("second").exists()
    assert not killed_at(careless, 99)
