"""One contract for every store: a local folder, gs:// on the rehearsal server, s3:// on moto.

Then what object services do to a client: lost replies, cuts, damage, refusals, forgotten uploads.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import os
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("google.cloud.storage", reason="gs:// needs the extra `google`")

from launcher.rehearsal.faults import Fault, Script, Seeded
from launcher.rehearsal.gcs import GcsServer
from launcher.rehearsal.gcs_state import Conditions
from tests.trainer.remote import QUICK, environment, moto_server
from trainer.store import Denied, FileStore, NotFound, Store, StoreError, Transient, open_store
from trainer.store_gcs import GcsStore
from trainer.store_remote import ONCE, Patience
from trainer.store_s3 import S3Store

PATIENCE = Patience(**QUICK, total=5.0)
ONE_TRY = Patience(**QUICK, total=0.0)
UNIQUE = itertools.count()
AWS = {
    "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1", "AWS_SESSION_TOKEN": None, "AWS_PROFILE": None,
    "AWS_CONFIG_FILE": "/nowhere", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip

Make = Callable[[], Store]


@pytest.fixture(scope="module")
def gcs() -> Iterator[GcsServer]:
    with GcsServer() as server, environment(STORAGE_EMULATOR_HOST=server.url):
        server.objects.create_bucket("runs", {})
        yield server


@pytest.fixture
def server(gcs: GcsServer) -> Iterator[GcsServer]:
    """The same server with an empty log and no faults left over."""
    gcs.log.clear()
    gcs.faults = Script()
    yield gcs
    gcs.faults = Script()
    gcs.objects.denied.clear()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    boto3 = pytest.importorskip("boto3", reason="s3:// needs the extra `s3`")
    pytest.importorskip("moto.server", reason="the S3 server of the tests is moto[server]")
    with moto_server() as url, environment(AWS_ENDPOINT_URL_S3=url, **AWS):
        boto3.session.Session().client("s3").create_bucket(Bucket="runs")
        yield url


@pytest.fixture(scope="module", params=["file", "gs", "s3"])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes an empty store, of each kind in turn."""
    if request.param == "file":
        return lambda: FileStore(tmp_path_factory.mktemp("store"))
    request.getfixturevalue("gcs" if request.param == "gs" else "s3")
    kind = GcsStore if request.param == "gs" else S3Store
    return lambda: kind(f"{request.param}://runs/é {next(UNIQUE)}#?", PATIENCE)


parts = st.text(st.sampled_from("ab.-é #?%+&=~:*"), min_size=1, max_size=4).filter(
    lambda part: part not in (".", "..")
)
#: Values lie one folder deep under names that are no values themselves.
keys = st.tuples(parts.map(lambda p: f"d{p}"), parts.map(lambda p: f"f{p}")).map("/".join)
acts = st.sampled_from(["put", "file", "once", "delete"])
#: Few keys, so that the steps meet each other.
plans = st.lists(keys, min_size=1, max_size=3, unique=True).flatmap(
    lambda few: st.lists(
        st.tuples(acts, st.sampled_from(few), st.binary(max_size=9)), min_size=1, max_size=8
    )
)


def play(store: Store, steps: list[tuple[str, str, bytes]], scratch: Path) -> dict[str, bytes]:
    """Do the steps to a store and to a dictionary; both agree on every answer."""
    model: dict[str, bytes] = {}
    for act, key, data in steps:
        if act == "put":
            store.put_bytes(key, data)
            model[key] = data
        elif act == "file":
            (scratch / "source").write_bytes(data)
            store.put_file(key, scratch / "source")
            model[key] = data
        elif act == "once":
            assert store.create_once(key, data) == (key not in model)
            model.setdefault(key, data)
        else:
            store.delete(key)
            model.pop(key, None)
            assert not store.exists(key)
    return model


def agree(store: Store, model: dict[str, bytes], scratch: Path) -> None:
    assert store.list() == sorted(model)
    for key, data in model.items():
        assert store.get_bytes(key) == data and store.exists(key)
        assert store.checksum(key) == hashlib.sha256(data).hexdigest()
        assert store.list(key[:3]) == sorted(k for k in model if k.startswith(key[:3]))
        store.get_file(key, scratch / "folder" / "copy")
        assert (scratch / "folder" / "copy").read_bytes() == data


def test_a_store_behaves_like_a_dictionary(make: Make) -> None:
    store = make()

    @settings(max_examples=25, derandomize=True, deadline=None)
    @given(plans)
    def check(steps: list[tuple[str, str, bytes]]) -> None:
        for key in store.list():
            store.delete(key)
        with tempfile.TemporaryDirectory() as folder:
            agree(store, play(store, steps, Path(folder)), Path(folder))

    check()


def test_one_of_many_writers_creates_the_record(make: Make) -> None:
    store, won, start = make(), [], threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        if store.create_once("journal/00000001.json", bytes([number]) * 1000):
            won.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get_bytes("journal/00000001.json") == bytes(won) * 1000


def test_the_same_record_is_created_once_by_one_writer(make: Make) -> None:
    store = make()
    assert [store.create_once("lock", b"same") for _ in range(3)] == [True, False, False]


@pytest.mark.parametrize("key", ["", "/etc/x", "../x", "a/../../x", "a//b", ".", "a/", "a\0b"])
def test_keys_never_leave_the_store(make: Make, key: str) -> None:
    store = make()
    for act in (lambda: store.put_bytes(key, b"x"), lambda: store.get_bytes(key)):
        with pytest.raises(StoreError, match="must be relative"):
            act()
    with pytest.raises(StoreError, match="must be relative"):
        store.list("../")


def test_what_is_not_there_is_said_in_one_line(make: Make, tmp_path: Path) -> None:
    store = make()
    for act in (
        lambda: store.get_bytes("a/b"),
        lambda: store.checksum("a/b"),
        lambda: store.get_file("a/b", tmp_path / "copy"),
    ):
        with pytest.raises(NotFound, match=r"cannot read a/b in .*: it does not exist$"):
            act()
    assert not store.exists("a/b") and not (tmp_path / "copy").exists()
    store.delete("a/b")
    with pytest.raises(NotFound, match=r"cannot read .*absent: it does not exist"):
        store.put_file("copy", tmp_path / "absent")


def test_large_files_go_in_pieces_and_come_back_whole(make: Make, tmp_path: Path) -> None:
    store, source = make(), tmp_path / "large"
    source.write_bytes(os.urandom(11 << 20))
    if isinstance(store, GcsStore):
        store.chunk_bytes = 1 << 20
    if isinstance(store, S3Store):
        store.part_bytes = 5 << 20
    store.put_file("checkpoints/large", source)
    store.get_file("checkpoints/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert store.checksum("checkpoints/large") == hashlib.sha256(source.read_bytes()).hexdigest()


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_missing_bucket_is_named_with_what_makes_it(
    scheme: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    request.getfixturevalue({"gs": "server", "s3": "s3"}[scheme])
    store = open_store(f"{scheme}://no-such-bucket/x")
    make = {"gs": "gcloud storage buckets create gs://", "s3": "aws s3 mb s3://"}[scheme]
    for act in (
        lambda: store.get_bytes("k"),
        lambda: store.put_bytes("k", b""),
        lambda: store.list(),
        lambda: store.exists("k"),
        lambda: store.checksum("k"),
        lambda: store.create_once("k", b""),
    ):
        with pytest.raises(StoreError, match=f"no bucket no-such-bucket; .*{make}no") as raised:
            act()
        assert not isinstance(raised.value, NotFound) and "\n" not in str(raised.value)


@pytest.mark.parametrize("uri", ["gs://runs", "s3://runs"])
def test_names_that_an_object_cannot_have_are_refused_before_anything_is_asked(uri: str) -> None:
    store = open_store(uri)
    for key, words in (("a\nb", "line break"), ("é" * 513, "at most 1024"), ("\ud800", "UTF-8")):
        with pytest.raises(StoreError, match=words):
            store.put_bytes(key, b"")


@pytest.mark.parametrize(
    ("uri", "module", "words"),
    [
        ("gs://b/x", "google.cloud.storage", r"needs google-cloud-storage.*launch-llm\[google\]"),
        ("s3://b/x", "boto3", r"needs boto3; .*launch-llm\[s3\]"),
    ],
)
def test_a_missing_client_says_what_to_install(
    uri: str, module: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StoreError, match=words):
        open_store(uri).exists("k")


def test_without_credentials_gs_says_how_to_log_in() -> None:
    nowhere = {"GOOGLE_APPLICATION_CREDENTIALS": "/nowhere", "STORAGE_EMULATOR_HOST": None}
    with environment(**nowhere), pytest.raises(Denied, match="gcloud auth application-default"):
        open_store("gs://bucket/x").exists("k")


def test_without_credentials_s3_says_how_to_give_some(s3: str) -> None:
    nobody = environment(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
    with nobody, pytest.raises(Denied, match=r"no AWS credentials.*aws configure") as raised:
        S3Store("s3://runs/x", ONE_TRY).exists("k")
    assert "\n" not in str(raised.value)


def test_s3_that_is_away_is_transient(s3: str) -> None:
    away = environment(AWS_ENDPOINT_URL_S3="http://127.0.0.1:9")
    with away, pytest.raises(Transient, match=r"cannot write s3://runs/x/k: .*try again later"):
        S3Store("s3://runs/x", ONE_TRY).put_bytes("k", b"")


def test_a_refusal_names_the_role_and_the_command(server: GcsServer) -> None:
    store = GcsStore("gs://runs/refused", PATIENCE)
    server.objects.denied.add("runs")
    with pytest.raises(Denied) as raised:
        store.get_bytes("k")
    for words in ("cannot read k in gs://runs/refused", "storage.objects.get", "objectViewer"):
        assert words in str(raised.value)
    with pytest.raises(Denied, match=r"add-iam-policy-binding gs://runs .*objectUser"):
        store.put_bytes("k", b"")
    asked = [target for _, target, status in server.log if status == 403 and "/o" in target]
    assert len(asked) == 2  # never asked again


def test_a_created_record_whose_reply_was_lost_is_ours(server: GcsServer) -> None:
    store = GcsStore("gs://runs/lost", PATIENCE)
    server.faults = Script([("POST /upload", Fault("cut_after"))])
    assert store.create_once("journal/1", b"same")
    assert [status for method, _, status in server.log if method == "POST"] == [0, 412]
    # Another writer of the very same bytes has not written them.
    server.faults = Script([("POST /upload", Fault("cut_before"))])
    assert not GcsStore("gs://runs/lost", PATIENCE).create_once("journal/1", b"same")


def test_an_unknown_outcome_is_cleared_up_by_the_next_call(server: GcsServer) -> None:
    store = GcsStore("gs://runs/unknown", ONE_TRY)
    server.faults = Script([("POST /upload", Fault("cut_after"))])
    with pytest.raises(Transient, match="cannot write gs://runs/unknown/1: "):
        store.create_once("1", b"x")
    assert store.create_once("1", b"x")
    assert not store.create_once("1", b"x")


def test_a_cut_upload_goes_on_where_it_was(server: GcsServer, tmp_path: Path) -> None:
    store = GcsStore("gs://runs/cut", PATIENCE, chunk_bytes=1 << 20)
    source = tmp_path / "large"
    source.write_bytes(os.urandom(9 << 20))
    cuts = [Fault("cut_upload", at_bytes=700_000), Fault("cut_after"), Fault("cut_before")]
    server.faults = Script([(r"PUT .*upload_id", cut) for cut in cuts])
    store.put_file("large", source)
    assert server.objects.content("runs", "cut/large") == source.read_bytes()
    sent = [row for row in server.log if row[0] == "PUT"]
    assert len(sent) == 9 + 3 and not server.faults.left


@pytest.mark.parametrize("status", [404, 410])
def test_an_upload_that_the_service_forgot_is_begun_again(
    server: GcsServer, tmp_path: Path, status: int
) -> None:
    store = GcsStore("gs://runs/forgotten", PATIENCE, chunk_bytes=1 << 20)
    source = tmp_path / "large"
    source.write_bytes(os.urandom(9 << 20))
    server.faults = Script([(r"PUT .*upload_id", Fault("slow")) for _ in range(4)])
    server.faults.add(r"PUT .*upload_id", Fault("status", status))
    store.put_file("large", source)
    assert server.objects.content("runs", "forgotten/large") == source.read_bytes()
    begun = [target for _, target, _ in server.log if target.endswith("uploadType=resumable")]
    assert len(begun) == 2


@pytest.mark.parametrize("size", [100, 9 << 20])
def test_what_is_damaged_on_the_way_up_is_sent_again(
    server: GcsServer, tmp_path: Path, size: int
) -> None:
    store = GcsStore("gs://runs/damaged", PATIENCE, chunk_bytes=16 << 20)
    source = tmp_path / "source"
    source.write_bytes(os.urandom(size))
    script = Script()
    # Of a resumable upload the second request carries the bytes.
    script.add("POST .*multipart" if size == 100 else "PUT .*upload_id", Fault("corrupt"))
    server.faults = script
    store.put_file(f"{size}", source)
    assert server.objects.content("runs", f"damaged/{size}") == source.read_bytes()
    assert not script.left


def test_what_is_damaged_on_the_way_down_is_fetched_again(server: GcsServer) -> None:
    store = GcsStore("gs://runs/down", PATIENCE)
    store.put_bytes("k", b"value" * 100)
    server.faults = Script([("GET .*alt=media", Fault("corrupt"))])
    assert store.get_bytes("k") == b"value" * 100
    server.faults = Script([("GET .*alt=media", Fault("corrupt"))] * 3)
    with pytest.raises(Transient, match=r"cannot read k in .*damaged on the way 3 times"):
        store.get_bytes("k")


def test_a_cut_download_goes_on_and_is_verified(server: GcsServer, tmp_path: Path) -> None:
    store, data = GcsStore("gs://runs/resumed", PATIENCE), os.urandom(3 << 20)
    store.put_bytes("k", data)
    server.faults = Script([("GET .*alt=media", Fault("cut_download", at_bytes=1_000_000))])
    assert store.get_bytes("k") == data
    assert [status for _, target, status in server.log if "alt=media" in target] == [200, 206]
    # The library does not look at what it had to continue: we do.
    cut_then_bad = [Fault("cut_download", at_bytes=1_000_000), Fault("corrupt")]
    server.faults = Script([("GET .*alt=media", fault) for fault in cut_then_bad])
    server.log.clear()
    store.get_file("k", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert [status for _, target, status in server.log if "alt=media" in target] == [200, 206, 200]
    server.faults = Script([("GET .*alt=media", Fault("cut_download", at_bytes=1_000_000))])
    with pytest.raises(Transient, match=r"^cannot read k in gs://runs/resumed: .*try again later$"):
        GcsStore("gs://runs/resumed", ONE_TRY).get_bytes("k")


def test_an_object_that_is_stored_packed_is_read_unpacked(
    server: GcsServer, tmp_path: Path
) -> None:
    """As `gcloud storage cp --gzip-local` leaves it; checksums and ranges are of what is stored."""
    data = os.urandom(700_000).hex().encode()
    packed = gzip.compress(data[:1000]) + gzip.compress(data[1000:]) + bytes(8)

    def put(name: str, content: bytes, encoding: str | None = "gzip") -> None:
        wanted = {} if encoding is None else {"contentEncoding": encoding}
        server.objects.insert("runs", f"packed/{name}", content, wanted, Conditions())

    def downloads() -> list[int]:
        return [status for _, target, status in server.log if "alt=media" in target]

    put("k", packed)
    assert GcsStore("gs://runs/packed", PATIENCE).get_bytes("k") == data
    assert downloads() == [200, 200]  # the first answer says how it is stored
    server.log.clear()
    store = GcsStore("gs://runs/packed", PATIENCE)
    assert [(e.size, e.packed) for e in store.entries()] == [(len(packed), True)]
    server.faults = Script([("GET .*alt=media", Fault("cut_download", at_bytes=300_000))])
    store.get_file("k", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data and downloads() == [200, 206]
    assert store.checksum("k") == hashlib.sha256(data).hexdigest()
    server.faults = Script([("GET .*alt=media", Fault("corrupt"))])
    assert store.get_bytes("k") == data
    # Others put plain objects in its place, and archives that nobody says are packed.
    for content, encoding in ((b"plain", None), (packed, None), (packed, "gzip"), (b"", "gzip")):
        put("k", content, encoding)
        assert store.get_bytes("k") == (data if content and encoding else content)


def test_what_is_not_packed_as_it_says_names_the_command(server: GcsServer) -> None:
    cut = gzip.compress(bytes(1000))[:-9]
    for content, why in ((b"plain", r"is no whole gzip \(Error -3"), (cut, "it ends too early")):
        wanted = {"contentEncoding": "gzip"}
        server.objects.insert("runs", "wrong/a b", content, wanted, Conditions())
        store = GcsStore("gs://runs/wrong", PATIENCE)
        with pytest.raises(StoreError, match=why) as caught:
            store.get_bytes("a b")
        assert "cannot read gs://runs/wrong/a b: " in str(caught.value)
        command = "gcloud storage objects update --clear-content-encoding 'gs://runs/wrong/a b'"
        assert str(caught.value).endswith(command)
        assert not isinstance(caught.value, Transient)


def test_the_stand_in_unpacks_for_clients_that_do_not(server: GcsServer) -> None:
    stored = gzip.compress(b"text")
    server.objects.insert("runs", "plain/k", stored, {"contentEncoding": "gzip"}, Conditions())
    url = f"{server.url}/download/storage/v1/b/runs/o/plain%2Fk?alt=media"
    for accepts, body in (("identity", b"text"), ("gzip", stored)):
        asked = urllib.request.Request(url, headers={"Accept-Encoding": accepts})
        with urllib.request.urlopen(asked) as answer:
            assert answer.read() == body
            assert answer.headers["X-Goog-Stored-Content-Encoding"] == "gzip"
            assert answer.headers.get("Content-Encoding") == ("gzip" if body == stored else None)


def test_a_page_in_place_of_an_answer_is_an_outage(server: GcsServer, tmp_path: Path) -> None:
    """What a proxy, or the login page of a network, answers with 200. No page is a value."""
    store = GcsStore("gs://runs/page", ONCE)
    store.put_bytes("k", b"x")
    large = tmp_path / "large"
    large.write_bytes(bytes(9 << 20))
    for act in (
        lambda: store.get_bytes("k"), lambda: store.get_file("k", tmp_path / "k"),
        lambda: store.put_bytes("k", b"y"), lambda: store.put_file("k", large),
        lambda: store.create_once("new", b"y"), lambda: store.list(), lambda: store.exists("k"),
    ):  # fmt: skip
        server.faults = Script([("", Fault("page"))] * 10)
        with pytest.raises(Transient) as caught:
            act()
        assert "\n" not in str(caught.value)
    server.faults = Script()
    assert store.get_bytes("k") == b"x" and store.list() == ["k"]
    assert store.create_once("new", b"z")


def test_storms_pass_and_outages_are_transient(server: GcsServer) -> None:
    store = GcsStore("gs://runs/storm", PATIENCE)
    storm = [Fault("status", 429), Fault("status", 503), Fault("cut_before")]
    server.faults = Script([("POST", fault) for fault in storm])
    store.put_bytes("k", b"x")
    assert store.get_bytes("k") == b"x"
    server.faults = Script([("", Fault("status", 503))] * 1000)
    short = GcsStore("gs://runs/storm", Patience(**QUICK, total=0.05))
    with pytest.raises(Transient, match=r"asked for 0.05 s \(.*503.*\); try again later$"):
        short.put_bytes("k", b"y")


@pytest.mark.parametrize("seed", range(12))
def test_faults_by_chance_change_no_answer(server: GcsServer, seed: int, tmp_path: Path) -> None:
    rates = {
        Fault("status", 503): 0.1, Fault("status", 429): 0.05, Fault("cut_before"): 0.1,
        Fault("cut_after"): 0.1, Fault("corrupt"): 0.1, Fault("cut_upload", at_bytes=20): 0.05,
        Fault("cut_download", at_bytes=30): 0.05,
    }  # fmt: skip
    server.faults = seeded = Seeded(seed, rates)
    keys = [f"d{n}/f" for n in range(4)]
    kinds = ["put", "once", "file", "once", "delete"]
    steps = [
        (kinds[(n * 7 + seed) % 5], keys[(n * n + seed) % 4], bytes([n, seed]) * 40)
        for n in range(16)
    ]
    store = GcsStore(f"gs://runs/chance-{seed}", PATIENCE)
    model = play(store, steps, tmp_path)
    agree(store, model, tmp_path)
    assert len(seeded.met) > 3


def test_a_checksum_of_ours_costs_no_download(server: GcsServer) -> None:
    store = GcsStore("gs://runs/sums", PATIENCE)
    store.put_bytes("ours", b"x")
    assert store.checksum("ours") == hashlib.sha256(b"x").hexdigest()
    assert not [row for row in server.log if "alt=media" in row[1]]
    server.objects.insert("runs", "sums/theirs", b"y", {}, Conditions())
    server.objects.insert("runs", "sums/folder/", b"", {}, Conditions())
    assert store.checksum("theirs") == hashlib.sha256(b"y").hexdigest()
    assert store.list() == ["ours", "theirs"]  # not what a console left behind


def test_a_file_that_changes_while_it_is_sent_is_told(server: GcsServer, tmp_path: Path) -> None:
    source = tmp_path / "growing"
    source.write_bytes(b"x" * 100)

    class Grows:
        def next(self, request: str) -> None:
            with source.open("ab") as file:
                file.write(b"y")

    server.faults = Grows()
    with pytest.raises(StoreError, match="growing: changed while it was being uploaded"):
        GcsStore("gs://runs/growing", PATIENCE).put_file("k", source)


def test_opening_a_store_imports_no_client_and_asks_nothing() -> None:
    import subprocess

    code = (
        "import sys; from trainer.store import open_store\n"
        "open_store('gs://b/x'), open_store('s3://b/x')\n"
        "heavy = ('google.cloud.storage', 'google.auth', 'boto3', 'requests')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
