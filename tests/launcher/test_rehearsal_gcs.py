"""The rehearsal's object store: the protocol by hand, and three clients that we did not write."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import shutil
import subprocess
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("google.cloud.storage", reason="the extra `rehearse` is not installed")

from launcher.clock import ManualClock
from launcher.rehearsal.faults import Both, Fault, Script, Seeded
from launcher.rehearsal.gcs import GcsServer
from launcher.rehearsal.gcs_state import GRAIN, crc32c
from tests.trainer.remote import environment


@pytest.fixture(scope="module")
def gcs() -> Iterator[GcsServer]:
    with GcsServer() as server, environment(STORAGE_EMULATOR_HOST=server.url):
        yield server


@pytest.fixture
def server(gcs: GcsServer) -> GcsServer:
    """The server with one empty bucket `b`."""
    for name in list(gcs.objects.buckets):
        for key in gcs.objects.names(name):
            gcs.objects.delete(name, key)
        gcs.objects.delete_bucket(name)
    gcs.objects.create_bucket("b", {})
    gcs.faults = Script()
    gcs.log.clear()
    return gcs


def ask(
    server: GcsServer, method: str, target: str, body: bytes = b"", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own: status, headers, body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, target, body, named)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def put(server: GcsServer, name: str, content: bytes, query: str = "") -> tuple[int, Any]:
    quoted = urllib.parse.quote(name, safe="")
    target = f"/upload/storage/v1/b/b/o?uploadType=media&name={quoted}{query}"
    status, _, body = ask(server, "POST", target, content)
    return status, json.loads(body)


def begin(server: GcsServer, name: str, query: str = "") -> str:
    target = f"/upload/storage/v1/b/b/o?uploadType=resumable&name={name}{query}"
    status, headers, _ = ask(server, "POST", target, b"{}")
    assert status == 200
    return headers["Location"].removeprefix(server.url)


@pytest.mark.parametrize(
    ("query", "absent", "present"),
    [
        ("ifGenerationMatch=0", 200, 412),
        ("ifGenerationMatch=G", 412, 200),
        ("ifGenerationMatch=1", 412, 412),
        ("ifGenerationNotMatch=0", 412, 200),
        ("ifGenerationNotMatch=G", 200, 412),
        ("ifMetagenerationMatch=1", 412, 200),
        ("ifMetagenerationMatch=2", 412, 412),
        ("ifMetagenerationNotMatch=1", 200, 412),
        ("ifMetaGenerationNotMatch=1", 200, 412),
    ],
)
def test_writes_hold_their_preconditions(
    server: GcsServer, query: str, absent: int, present: int
) -> None:
    generation = put(server, "k", b"old")[1]["generation"]
    query = "&" + query.replace("=G", f"={generation}")
    assert put(server, "new", b"x", query)[0] == absent
    assert put(server, "k", b"new", query)[0] == present
    assert server.objects.content("b", "k") == (b"new" if present == 200 else b"old")


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
@pytest.mark.parametrize(
    ("query", "status"),
    [("ifGenerationMatch=G", 200), ("ifGenerationMatch=1", 412), ("ifGenerationNotMatch=1", 200),
     ("ifGenerationNotMatch=G", 412), ("ifMetagenerationMatch=1", 200),
     ("ifMetagenerationMatch=7", 412), ("generation=G", 200), ("generation=1", 404)],
)  # fmt: skip
def test_every_verb_holds_its_preconditions(
    server: GcsServer, method: str, query: str, status: int
) -> None:
    generation = put(server, "k", b"old")[1]["generation"]
    if method == "GET" and "NotMatch=G" in query:
        status = 304
    query = query.replace("=G", f"={generation}")
    got, _, body = ask(server, method, f"/storage/v1/b/b/o/k?{query}", b"{}")
    assert got == (204 if method == "DELETE" and status == 200 else status)
    gone = method == "DELETE" and status == 200
    assert (server.objects.find("b", "k") is None) == gone
    assert body == b"" if got in (204, 304) else json.loads(body)


def test_copies_hold_the_preconditions_of_both_ends(server: GcsServer) -> None:
    made = put(server, "a", b"x")[1]
    for query, status in (
        ("ifSourceGenerationMatch=1", 412),
        (f"ifSourceGenerationMatch={made['generation']}&ifGenerationMatch=0", 200),
        ("ifGenerationMatch=0", 412),
    ):
        target = f"/storage/v1/b/b/o/a/rewriteTo/b/b/o/c%2Fd?{query}"
        assert ask(server, "POST", target, b"{}")[0] == status
    assert server.objects.content("b", "c/d") == b"x"
    assert ask(server, "POST", "/storage/v1/b/b/o/a/moveTo/o/e")[0] == 200
    assert server.objects.names("b") == ["c/d", "e"]
    sources = [{"name": "c/d"}, {"name": "e", "objectPreconditions": {"ifGenerationMatch": "1"}}]
    body = json.dumps({"sourceObjects": sources}).encode()
    assert ask(server, "POST", "/storage/v1/b/b/o/f/compose", body)[0] == 412
    sources[1].pop("objectPreconditions")
    body = json.dumps({"sourceObjects": sources}).encode()
    status, _, made_of = ask(server, "POST", "/storage/v1/b/b/o/f/compose", body)
    assert status == 200 and json.loads(made_of)["componentCount"] == 2
    assert server.objects.content("b", "f") == b"xx"


def test_a_resumable_upload_says_where_it_is(server: GcsServer) -> None:
    data = os.urandom(600 * 1024)
    total = len(data)
    where = begin(server, "k")
    assert ask(server, "PUT", where, Content_Range=f"bytes */{total}")[:1] == (308,)
    piece = data[: 300 * 1024]
    reply = ask(server, "PUT", where, piece, Content_Range=f"bytes 0-{len(piece) - 1}/{total}")
    assert reply[0] == 308 and reply[1]["Range"] == f"bytes=0-{GRAIN - 1}"
    reply = ask(server, "PUT", where, Content_Range=f"bytes */{total}")
    assert reply[0] == 308 and reply[1]["Range"] == f"bytes=0-{GRAIN - 1}"
    beyond = ask(server, "PUT", where, b"x", Content_Range=f"bytes {GRAIN + 1}-{GRAIN + 1}/{total}")
    assert beyond[0] == 400
    assert server.objects.find("b", "k") is None
    rest = data[GRAIN:]
    reply = ask(server, "PUT", where, rest, Content_Range=f"bytes {GRAIN}-{total - 1}/{total}")
    assert reply[0] == 200 and server.objects.content("b", "k") == data
    again = ask(server, "PUT", where, Content_Range=f"bytes */{total}")
    assert (
        again[0] == 200 and json.loads(again[2])["generation"] == json.loads(reply[2])["generation"]
    )
    assert ask(server, "PUT", where[:-3] + "xyz", Content_Range="bytes */*")[0] == 404
    assert ask(server, "DELETE", begin(server, "other"))[0] == 499


def test_a_resumable_upload_holds_its_precondition_at_its_end(server: GcsServer) -> None:
    where = begin(server, "k", "&ifGenerationMatch=0")
    put(server, "k", b"another was faster")
    assert ask(server, "PUT", where, b"mine", Content_Range="bytes 0-3/4")[0] == 412
    assert server.objects.content("b", "k") == b"another was faster"


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(0, 5 * GRAIN), st.lists(st.tuples(st.integers(1, 3), st.booleans())))
def test_any_pieces_and_cuts_make_the_object(
    gcs: GcsServer, size: int, pieces: list[tuple[int, bool]]
) -> None:
    if "b" not in gcs.objects.buckets:
        gcs.objects.create_bucket("b", {})
    data = hashlib.shake_128(str(size).encode()).digest(size)
    where = begin(gcs, "pieces")
    plan = iter(pieces)
    while True:
        reply = ask(gcs, "PUT", where, Content_Range=f"bytes */{size}")
        if reply[0] == 200:
            break
        at = int(reply[1].get("Range", "bytes=0--1").rpartition("-")[2]) + 1
        at = at if "Range" in reply[1] else 0
        grains, cut = next(plan, (99, False))
        piece = data[at : at + grains * GRAIN]
        if cut:
            gcs.faults = Script([("PUT", Fault("cut_upload", at_bytes=len(piece) * 2 // 3))])
            with pytest.raises(OSError):
                end = at + len(piece) - 1
                ask(gcs, "PUT", where, piece, Content_Range=f"bytes {at}-{end}/{size}")
            gcs.faults = Script()
        elif piece:
            end = at + len(piece) - 1
            ask(gcs, "PUT", where, piece, Content_Range=f"bytes {at}-{end}/{size}")
        else:
            ask(gcs, "PUT", where, b"")
    assert gcs.objects.content("b", "pieces") == data


@pytest.mark.parametrize(
    ("asked", "status", "got"),
    [
        ("bytes=0-3", 206, b"0123"), ("bytes=4-", 206, b"456789"), ("bytes=-2", 206, b"89"),
        ("bytes=8-99", 206, b"89"), ("bytes=-99", 206, b"0123456789"),
        ("bytes=0-0,2-2", 200, b"0123456789"), ("bytes=10-", 416, None),
        ("bytes=99-100", 416, None),
    ],
)  # fmt: skip
def test_ranges(server: GcsServer, asked: str, status: int, got: bytes | None) -> None:
    put(server, "k", b"0123456789")
    for path in ("/storage/v1/b/b/o/k?alt=media", "/download/storage/v1/b/b/o/k?alt=media"):
        reply = ask(server, "GET", path, Range=asked)
        assert reply[0] == status and (got is None or reply[2] == got)
    assert (reply[1].get("Content-Range") is None) == (status == 200)


names = st.lists(st.text("ab/é", min_size=1, max_size=4), max_size=12, unique=True)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(names, st.text("ab/", max_size=2), st.sampled_from(["", "/", "a"]), st.integers(1, 4))
def test_listings_have_every_name_once(
    gcs: GcsServer, found: list[str], prefix: str, delimiter: str, page: int
) -> None:
    from google.cloud import storage

    if "list" in gcs.objects.buckets:
        for name in gcs.objects.names("list"):
            gcs.objects.delete("list", name)
    else:
        gcs.objects.create_bucket("list", {})
    from launcher.rehearsal.gcs_state import Conditions

    for name in found:
        gcs.objects.insert("list", name, b"", {}, Conditions())
    listed = storage.Client().list_blobs(
        "list", prefix=prefix, delimiter=delimiter or None, page_size=page
    )
    got = [blob.name for blob in listed]
    below = sorted(name for name in found if name.startswith(prefix))
    ends = {name: name.find(delimiter, len(prefix)) if delimiter else -1 for name in below}
    assert got == [name for name in below if ends[name] < 0]
    assert listed.prefixes == {name[: end + 1] for name, end in ends.items() if end >= 0}


@pytest.mark.parametrize("header", ["crc32c", "md5"])
def test_a_wrong_checksum_is_refused(server: GcsServer, header: str) -> None:
    right = {"crc32c": crc32c(b"x"), "md5": base64.b64encode(hashlib.md5(b"x").digest()).decode()}
    target = "/upload/storage/v1/b/b/o?uploadType=media&name=k"
    for value, status in (("AAAAAA==", 400), (right[header], 200)):
        reply = ask(server, "POST", target, b"x", X_Goog_Hash=f"{header}={value}")
        assert reply[0] == status
        assert (server.objects.find("b", "k") is not None) == (status == 200)
    assert b"doesn't match calculated" in ask(
        server, "POST", target, b"x", X_Goog_Hash="crc32c=AAAAAA=="
    )[2].replace(b"\\u0027", b"'")


def test_crc32c_is_castagnoli() -> None:
    assert base64.b64decode(crc32c(b"123456789")).hex() == "e3069283"  # the check value of the CRC


def test_metadata_is_merged_replaced_and_counted(server: GcsServer) -> None:
    from google.cloud import storage

    blob = storage.Client().bucket("b").blob("k")
    blob.metadata = {"a": "1", "b": "2"}
    blob.upload_from_string(b"x", content_type="text/plain")
    blob.metadata = {"a": "3", "b": None}
    blob.patch()
    blob.reload()
    assert blob.metadata == {"a": "3"} and blob.metageneration == 2
    assert (blob.size, blob.content_type, blob.crc32c) == (1, "text/plain", crc32c(b"x"))


def test_two_writes_to_one_object_within_a_second_are_too_many() -> None:
    clock = ManualClock()
    with GcsServer(clock=clock, limit_writes=True) as server:
        server.objects.create_bucket("b", {})
        assert put(server, "k", b"1")[0] == put(server, "other", b"1")[0] == 200
        status, body = put(server, "k", b"2")
        assert status == 429 and body["error"]["errors"][0]["reason"] == "rateLimitExceeded"
        assert ask(server, "DELETE", "/storage/v1/b/b/o/k")[0] == 429
        clock.sleep(1.0)
        assert put(server, "k", b"2")[0] == 200


def test_a_new_server_over_the_same_folder_goes_on(tmp_path: Path) -> None:
    data = os.urandom(3 * GRAIN)
    with GcsServer(tmp_path) as first:
        port = first.port
        first.objects.create_bucket("b", {"location": "EU"})
        generation = int(put(first, "a/ü #?", b"kept")[1]["generation"])
        put(first, "gone", b"x")
        ask(first, "DELETE", "/storage/v1/b/b/o/gone")
        where = begin(first, "half")
        ask(first, "PUT", where, data[:GRAIN], Content_Range=f"bytes 0-{GRAIN - 1}/{len(data)}")
    with pytest.raises(ConnectionError):
        ask(first, "GET", "/storage/v1/b")
    with GcsServer(tmp_path, port=port) as second:
        assert second.objects.names("b") == ["a/ü #?"] and second.url == first.url
        assert second.objects.content("b", "a/ü #?") == b"kept"
        assert second.objects.bucket("b")["location"] == "EU"
        rest = f"bytes {GRAIN}-{len(data) - 1}/{len(data)}"
        assert ask(second, "PUT", where, data[GRAIN:], Content_Range=rest)[0] == 200
        assert second.objects.content("b", "half") == data
        assert int(put(second, "new", b"")[1]["generation"]) > generation


def test_a_stopped_server_cuts_the_connections_that_it_has() -> None:
    with GcsServer() as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("GET", "/storage/v1/b")
        connection.getresponse().read()
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        connection.request("GET", "/storage/v1/b")
        connection.getresponse()


@pytest.mark.parametrize(
    ("method", "target", "body", "status"),
    [
        ("GET", "/nothing", b"", 404), ("GET", "/storage/v1/x", b"", 404),
        ("GET", "/storage/v1/b/absent", b"", 404), ("GET", "/storage/v1/b/absent/o", b"", 404),
        ("GET", "/storage/v1/b/b/o/absent", b"", 404), ("POST", "/storage/v1/b", b"[", 400),
        ("POST", "/storage/v1/b", b"{}", 400), ("POST", "/storage/v1/b", b'{"name": "b"}', 409),
        ("DELETE", "/storage/v1/b/b", b"", 204), ("GET", "/storage/v1/b/b/storageLayout", b"", 200),
        ("POST", "/upload/storage/v1/b/b/o?uploadType=media&name=a%0Ab", b"", 400),
        ("POST", "/upload/storage/v1/b/b/o?uploadType=odd&name=k", b"", 400),
        ("POST", "/upload/storage/v1/b/b/o?uploadType=multipart", b"no parts", 400),
        ("GET", "/storage/v1/b/b/o/k?ifGenerationMatch=x", b"", 404),
    ],
)  # fmt: skip
def test_odd_requests_get_the_answer_of_the_service(
    server: GcsServer, method: str, target: str, body: bytes, status: int
) -> None:
    got, headers, text = ask(server, method, target, body)
    assert got == status
    if status >= 400:
        assert json.loads(text)["error"]["code"] == status
        assert headers["Content-Type"].startswith("application/json")


def test_a_body_in_chunks_is_read_whole(server: GcsServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    target = "/upload/storage/v1/b/b/o?uploadType=media&name=k"
    pieces = (bytes([n]) * (n * 1000) for n in range(1, 9))
    connection.request("POST", target, pieces, encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()
    assert len(server.objects.content("b", "k")) == 36_000


def test_a_schedule_is_the_same_for_the_same_seed() -> None:
    rates = {Fault("cut_before"): 0.3, Fault("status", 429): 0.3}
    asked = [f"GET /path/{n % 5}?q={n}" for n in range(200)]
    first, second, other = Seeded(1, rates), Seeded(1, rates), Seeded(2, rates)
    answers = [first.next(one) for one in asked]
    assert answers == [second.next(one) for one in asked] != [other.next(one) for one in asked]
    # Another order between paths changes nothing for a path.
    third = Seeded(1, rates)
    ordered = sorted(asked, key=lambda one: one.partition("?")[0])
    by_path = [third.next(one) for one in ordered]
    assert by_path == [answers[asked.index(one)] for one in ordered]
    for path in range(5):
        row = "".join("x" if answers[n] else "." for n in range(200) if n % 5 == path)
        assert "xxx" not in row and "x" in row
    with pytest.raises(ValueError, match="at most 1"):
        Seeded(1, {Fault("slow"): 1.5})


def test_a_script_uses_each_fault_once_and_schedules_add_up(server: GcsServer) -> None:
    script = Script([("GET /storage", Fault("status", 503)), ("", Fault("status", 429))])
    server.faults = Both([Script(), script])
    put(server, "k", b"x")  # takes the second entry
    assert [ask(server, "GET", "/storage/v1/b")[0] for _ in range(2)] == [503, 200]
    assert not script.left and [row[2] for row in server.log] == [429, 503, 200]


def test_latency_passes_on_the_clock_that_was_given() -> None:
    clock = ManualClock()
    with GcsServer(clock=clock, faults=Script([("", Fault("slow", seconds=3600.0))])) as server:
        before = clock.now()
        assert ask(server, "GET", "/storage/v1/b")[0] == 200
        assert clock.now() - before == 3600.0


def test_a_lost_reply_was_applied_and_a_lost_request_was_not(server: GcsServer) -> None:
    for kind, applied in (("cut_before", False), ("cut_after", True)):
        server.faults = Script([("POST", Fault(kind))])  # type: ignore[arg-type]
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            put(server, kind, b"x")
        assert (server.objects.find("b", kind) is not None) == applied


def test_the_google_client_uploads_downloads_copies_and_composes(server: GcsServer) -> None:
    from google.cloud import storage

    client = storage.Client()
    bucket = client.create_bucket("made")
    assert [one.name for one in client.list_buckets()] == ["b", "made"]
    data = os.urandom(9 << 20)
    blob = bucket.blob("large é #?", chunk_size=4 * GRAIN)
    blob.upload_from_file(io.BytesIO(data), size=len(data))
    assert bucket.blob("large é #?").download_as_bytes(start=5, end=9) == data[5:10]
    copied = bucket.copy_blob(blob, bucket, "copy")
    moved = bucket.rename_blob(copied, "renamed")
    joined = bucket.blob("joined")
    joined.compose([moved, blob])
    assert joined.download_as_bytes() == data + data and joined.component_count == 2
    with client.batch():
        for one in (blob, moved, joined):
            one.delete()
    assert list(bucket.list_blobs()) == []
    bucket.delete()
    assert client.lookup_bucket("made") is None


def test_gcsfs_writes_reads_moves_and_removes(
    server: GcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its probe for the kind of bucket would ask a service that no rehearsal has.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    files = gcsfs.GCSFileSystem(
        token="anon", endpoint_url=server.url, skip_instance_cache=True, use_listings_cache=False
    )
    data = os.urandom(6 << 20)
    with files.open("b/folder/large é #", "wb", block_size=5 << 20) as file:
        file.write(data)
    assert files.cat("b/folder/large é #") == data
    with pytest.raises(FileExistsError), files.open("b/folder/large é #", "xb") as file:
        file.write(b"x")
    files.mv("b/folder/large é #", "b/moved")
    assert files.find("b") == ["b/moved"] and files.info("b/moved")["size"] == len(data)
    files.rm("b/moved")
    assert files.find("b") == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not on PATH")
def test_gcloud_copies_lists_describes_and_removes(server: GcsServer) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "small ü").write_bytes(os.urandom(1000))
        (folder / "large").write_bytes(os.urandom(9 << 20))
        settings = {
            "CLOUDSDK_CONFIG": f"{name}/config", "CLOUDSDK_CORE_PROJECT": "p",
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true", "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{server.url}/",
        }  # fmt: skip

        def gcloud(*argv: str) -> str:
            done = subprocess.run(
                ["gcloud", "storage", *argv], env={**os.environ, **settings},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout

        gcloud("cp", f"{name}/small ü", f"{name}/large", "gs://b/up/")
        assert gcloud("ls", "-r", "gs://b/**").split("\n") == [
            "gs://b/up/large", "gs://b/up/small ü", "",
        ]  # fmt: skip
        assert gcloud("objects", "describe", "gs://b/up/large", "--format=value(size)") == (
            f"{9 << 20}\n"
        )
        gcloud("cp", "gs://b/up/large", f"{name}/back")
        assert (folder / "back").read_bytes() == (folder / "large").read_bytes()
        gcloud("rm", "-r", "gs://b/up")
        assert server.objects.names("b") == []
