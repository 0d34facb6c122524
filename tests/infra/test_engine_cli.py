"""Finding and installing the engine's command line, from a server on this machine."""

from __future__ import annotations

import hashlib
import io
import platform
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Optional

import pytest

from infra import engine_cli
from infra.errors import EngineError

VERSION = engine_cli.wanted()
ANSWER = f"#!/bin/sh\necho v{VERSION}\n".encode()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The folder that the site serves: an archive for this machine, and its checksums."""
    folder = tmp_path / "site"
    folder.mkdir()
    archive = folder / _name()
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in (
            ("pulumi/pulumi", ANSWER),
            ("pulumi/pulumi-language-python", b"#!/bin/sh\n"),
            ("pulumi/../../outside", b"stray"),
            ("outside", b"stray"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    _publish(folder, hashlib.sha256(archive.read_bytes()).hexdigest())
    return folder


@pytest.fixture
def site(published: Path) -> Iterator[str]:
    handler = partial(_Quiet, directory=str(published))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def _name() -> str:
    machine = {"x86_64": "x64", "aarch64": "arm64", "arm64": "arm64"}[platform.machine()]
    return f"pulumi-v{VERSION}-{platform.system().lower()}-{machine}.tar.gz"


def _publish(folder: Path, digest: str) -> None:
    lines = f"{'0' * 64}  pulumi-v{VERSION}-plan9-x64.tar.gz\n{digest}  {_name()}\n"
    (folder / f"pulumi-{VERSION}-checksums.txt").write_text(lines)


def _executable(folder: Path, answer: str) -> str:
    folder.mkdir(parents=True)
    (folder / "pulumi").write_text(f"#!/bin/sh\necho {answer}\n")
    (folder / "pulumi").chmod(0o755)
    return str(folder)


def test_it_is_fetched_checked_and_found_again(site: str, tmp_path: Path) -> None:
    home, said = tmp_path / "home", list[str]()
    environ = {"PATH": "/bin"}
    assert engine_cli.find(home, environ) is None

    cli = engine_cli.install(home, environ, said.append, site)

    assert cli == engine_cli.Cli(home / "pulumi/versions" / VERSION / "bin" / "pulumi", VERSION)
    assert engine_cli.find(home, environ) == cli
    assert said[0].startswith(f"fetching {site}/{_name()} (")
    assert said[-1].startswith(f"installed pulumi {VERSION}")
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted(
        [".lock", "pulumi", "pulumi-language-python", _name(), f"pulumi-{VERSION}-checksums.txt"]
    )


def test_an_archive_with_another_checksum_is_not_installed(
    site: str, published: Path, tmp_path: Path
) -> None:
    _publish(published, "f" * 64)

    with pytest.raises(EngineError, match=f"published is {'f' * 64}"):
        engine_cli.install(tmp_path / "home", {"PATH": "/bin"}, lambda line: None, site)

    assert engine_cli.find(tmp_path / "home", {"PATH": "/bin"}) is None
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


@pytest.mark.parametrize("missing", ["checksums", "archive"])
def test_what_the_site_does_not_have_is_told_with_the_way_by_hand(
    site: str, published: Path, tmp_path: Path, missing: str
) -> None:
    (published / (_name() if missing == "archive" else f"pulumi-{VERSION}-checksums.txt")).unlink()

    with pytest.raises(EngineError, match=r"could not be installed: .*404") as refused:
        engine_cli.install(tmp_path / "home", {"PATH": "/bin"}, lambda line: None, site)

    assert f"{site}/{_name()}" in refused.value.hint
    assert "on PATH" in refused.value.hint


def test_without_a_network_one_line_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="could not be installed") as refused:
        engine_cli.install(tmp_path, {"PATH": "/bin"}, lambda line: None, "http://127.0.0.1:9")

    assert "\n" not in str(refused.value)
    assert "unpack it" in refused.value.hint


@pytest.mark.parametrize("answer", ["v2.25.2", "v3.100.0", "v4.0.0", "nothing of use"])
def test_another_version_on_path_is_passed_over(tmp_path: Path, answer: str) -> None:
    on_path = _executable(tmp_path / "bin", answer)
    environ = {"PATH": f"{on_path}:/bin"}
    assert engine_cli.find(tmp_path / "home", environ) is None

    place = tmp_path / "home" / "pulumi" / "versions" / VERSION / "bin"
    _executable(place, f"v{VERSION}")

    assert engine_cli.find(tmp_path / "home", environ) == engine_cli.Cli(place / "pulumi", VERSION)


@pytest.mark.parametrize(
    ("answer", "says"),
    [("v3.100.0", "is 3.100.0"), ("v4.0.0", "is 4.0.0"), ("beta", "does not tell its version"),
     (f"v{VERSION}", None)],
)  # fmt: skip
def test_why_the_one_on_path_is_passed_over(
    tmp_path: Path, answer: str, says: Optional[str]
) -> None:
    on_path = _executable(tmp_path / "bin", answer)

    why = engine_cli.passed_over({"PATH": f"{on_path}:/bin"})

    allowed = "launch needs 3.206.0 or newer, and older than 4.0.0"
    assert why == (says and f"{on_path}/pulumi {says}: {allowed}")
    assert engine_cli.passed_over({"PATH": "/bin"}) is None


def test_of_two_installs_at_once_the_later_leaves_the_first_ones_folder(
    site: str, tmp_path: Path
) -> None:
    """The other one is done while this one fetches: its folder may be in use by now."""
    home, inode = tmp_path / "home", list[int]()
    place = home / "pulumi" / "versions" / VERSION

    def meanwhile(line: str) -> None:
        if not inode:
            _executable(place / "bin", f"v{VERSION}")
            inode.append((place / "bin" / "pulumi").stat().st_ino)

    cli = engine_cli.install(home, {"PATH": "/bin"}, meanwhile, site)

    assert cli.path.stat().st_ino == inode[0]
    assert [path.name for path in place.parent.iterdir()] == sorted([".lock", VERSION])


def test_a_damaged_folder_is_replaced(site: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    _executable(home / "pulumi" / "versions" / VERSION / "bin", "half of it")

    cli = engine_cli.install(home, {"PATH": "/bin"}, lambda line: None, site)

    assert engine_cli.find(home, {"PATH": "/bin"}) == cli
    assert (cli.path.parent / "pulumi-language-python").is_file()


def test_one_on_path_that_is_known_comes_first(tmp_path: Path) -> None:
    on_path = _executable(tmp_path / "bin", "v3.300.1")
    _executable(tmp_path / "home" / "pulumi" / "versions" / VERSION / "bin", f"v{VERSION}")

    found = engine_cli.find(tmp_path / "home", {"PATH": f"{on_path}:/bin"})

    assert found == engine_cli.Cli(Path(on_path) / "pulumi", "3.300.1")
