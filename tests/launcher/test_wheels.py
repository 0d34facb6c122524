"""Wheels are chosen when a run is planned: by what the image has, from mirrors, with a sha256."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import launcher.plan as planning
from launcher import api, hardware, recipe, start, wheels
from launcher.backends.vertex import VertexBackend
from launcher.claim import recipe_of
from launcher.errors import BadRequest, Denied, Exit, RecipeErrors, Transient
from launcher.recipe import Loaded
from launcher.spec import Environment, Wheel
from launcher.wheels import choose, mismatches, read_name, resolved
from tests.launcher.test_plan import BUNDLE, environment
from trainer.environment import TORCH

IMAGE = Environment(python="3.11", torch="2.9.1", cuda="12.8")
FITS = "flash_attn-2.8.3+cu12torch2.9cxx11abiTRUE-cp311-cp311-linux_x86_64.whl"
NAMES = (
    FITS,
    "flash_attn-2.8.3+cu12torch2.9cxx11abiFALSE-cp311-cp311-linux_x86_64.whl",
    "flash_attn-2.8.3+cu12torch2.9cxx11abiTRUE-cp312-cp312-linux_x86_64.whl",
    "flash_attn-2.8.3+cu12torch2.8cxx11abiTRUE-cp311-cp311-linux_x86_64.whl",
    "flash_attn-2.8.3+cu13torch2.9cxx11abiTRUE-cp311-cp311-linux_x86_64.whl",
    "flash_attn-2.8.3+cu12torch2.9cxx11abiTRUE-cp311-cp311-linux_aarch64.whl",
    "flash_attn-2.7.4.post1+cu12torch2.9cxx11abiTRUE-cp311-cp311-linux_x86_64.whl",
)
HEAD = """\
launch: 1
name: one
stage: pretrain
model: {name: org/model}
data: {train: [{path: "gs://bkt/t.jsonl"}]}
train: {steps: 100}
artifacts: gs://bkt/runs/{run}
hardware:
  backend: vertex
  accelerator: L4:1
  vertex: {project: p, image: own/trainer:1}
"""


FACTS = 'python: "3.11", torch: "2.9", cuda: "12.8"'


def block(source: str, more: str = "", facts: str = FACTS) -> str:
    return (
        f"  environment:\n    {{{facts},\n"
        f'     wheels: [{{name: flash-attn, source: "{source}"{more}}}]}}\n'
    )


def load(folder: Path, text: str, *overrides: str) -> Loaded:
    file = folder / "r.yaml"
    file.write_text(text)
    return recipe.load(file, overrides, environ={})


def problems(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeErrors) as caught:
        resolved(load(folder, text, *overrides))
    assert caught.value.code is Exit.USAGE
    return str(caught.value).replace(f"{folder}/", "")


def mirror(folder: Path, *names: str) -> dict[str, str]:
    """A folder of wheels of a few bytes; their sha256 by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())
    return {name: hashlib.sha256(name.encode()).hexdigest() for name in names}


def wheel_of(loaded: Loaded) -> Wheel:
    found = loaded.recipe.stages[0].hardware.environment
    assert found is not None
    return found.wheels[0]


# Names.


@pytest.mark.parametrize(
    ("file", "wrong"),
    [
        (FITS, []),
        # Seen in releases of flash-attn and of those who build it for others.
        ("flash_attn-2.8.3+cu12torch2.9cxx11abitrue-cp311-cp311-linux_x86_64.whl", []),
        ("flash_attn-2.8.3+cu126torch2.9.0cxx11abiTRUE-cp311-cp311-linux_x86_64.whl", []),
        ("flash_attn-2.8.3+cu128torch2.9-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
         []),
        ("flash_attn-2.8.3-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", []),
        ("flash_attn-2.8.3-cp39-abi3-linux_x86_64.whl", []),
        ("flash_attn-2.8.3-py3-none-any.whl", []),
        ("flash_attn-2.8.3+cu129torch2.9-cp311-cp311-linux_x86_64.whl", ["CUDA 12.9"]),
        ("flash_attn-2.8.3+cu130torch2.9.1cxx11abiTRUE-cp311-cp311-win_amd64.whl",
         ["cp311-cp311-win_amd64", "CUDA 13.0"]),
        ("flash_attn-2.8.3.post1+cu13torch2.13cxx11abitrue-cp312-cp312-linux_x86_64.whl",
         ["cp312-cp312-linux_x86_64", "torch 2.13", "CUDA 13"]),
        ("flash_attn-2.8.3-cp311-cp311-manylinux_2_34_x86_64.whl",
         ["cp311-cp311-manylinux_2_34_x86_64"]),
        (NAMES[1], ["C++11 ABI false"]),
        (NAMES[5], ["cp311-cp311-linux_aarch64"]),
    ],
)  # fmt: skip
def test_a_name_says_what_a_wheel_is_built_for(file: str, wrong: list[str]) -> None:
    assert mismatches(read_name(file), IMAGE) == wrong


def test_an_older_abi_a_major_version_of_cuda_and_a_newer_c_library() -> None:
    old = replace(IMAGE, cxx11_abi=False, cuda="12", glibc="2.36")
    assert mismatches(read_name(NAMES[1]), old) == []
    assert mismatches(read_name(FITS), old) == ["C++11 ABI true"]
    new = "flash_attn-2.8.3+cu129torch2.9cxx11abiFALSE-cp311-cp311-manylinux_2_34_x86_64.whl"
    assert mismatches(read_name(new), old) == []


def test_the_newest_that_fits_is_taken_and_the_one_that_says_most() -> None:
    wanted = Wheel("flash-attn", "gs://m/w")
    assert choose(wanted, IMAGE, [*NAMES, "notes.whl", "other-9.0-py3-none-any.whl"]) == FITS
    older = replace(wanted, version="2.7.4.post1")
    assert choose(older, IMAGE, NAMES) == NAMES[6]
    posts = [FITS.replace("2.8.3", f"2.8.3.post{n}") for n in (9, 10, 1)]
    assert choose(wanted, IMAGE, [*posts, FITS]) == posts[1]
    plain = "flash_attn-2.8.3-cp311-cp311-linux_x86_64.whl"
    closest = "flash_attn-2.8.3+cu128torch2.9cxx11abiTRUE-cp311-cp311-linux_x86_64.whl"
    assert choose(wanted, IMAGE, [plain, FITS, closest]) == closest
    assert choose(Wheel("Flash_Attn", "x"), IMAGE, [plain]) == plain


# The recipe.


def test_a_mirror_without_a_wheel_that_fits_is_refused_at_its_position(tmp_path: Path) -> None:
    mirror(tmp_path / "w", *NAMES[1:6])
    said = problems(tmp_path, HEAD + block("./w"))
    assert said.startswith("r.yaml:14:42: hardware.environment.wheels[0].source: no wheel of ")
    assert "flash-attn for Python 3.11, torch 2.9, CUDA 12.8, with C++11 ABI, glibc 2.28" in said
    assert f"{NAMES[1]} (C++11 ABI false)" in said and "; and 1 more" in said
    (tmp_path / "none").mkdir()
    said = problems(tmp_path, HEAD + block("./none"))
    assert "none has no wheel of flash-attn (0 wheels)" in said
    assert "has flash-attn 2.8.3, not 2.9.9" in problems(
        tmp_path, HEAD + block("./w", ', version: "2.9.9"')
    )
    assert "there is no folder " in problems(tmp_path, HEAD + block("./absent"))
    assert "there is no file " in problems(tmp_path, HEAD + block(f"./{FITS}"))


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (block("gs://m/w"), ["hardware.accelerator=T4:1"],
         "flash-attn needs a GPU of compute capability 8.0 or higher; T4 has 7.5"),
        (block("gs://m/w"), ["hardware.accelerator=V100:1"], "V100 has 7.0"),
        (block("gs://m/w"), ["hardware.accelerator=cpu:1"], "runs on NVIDIA GPUs, not on cpu"),
        (block("gs://m/w", facts='torch: "2.9"'), [], "needs `python`, `cuda` in hardware."),
        (block("gs://m/w", facts='python: "3.11", torch: "2.8", cuda: "12.8"'), [],
         "the trainer runs on torch 2.9 to 2.15, not on 2.8"),
        (block("gs://m/w", facts="python: 3.11"), [], "write it in quotes"),
        (block("gs://m/w", facts='python: "3"'), [], "python: must be a version such as 3.11"),
        (block("ftp://m/w"), [], "expected one of gs://, s3://, https:// or a path"),
        (block("https://me:pw@m/w"), [], "holds a password"),
        (block("https://m/w.whl?sig=1"), [], "holds a password, a signature"),
        (block("gs://m/w", ", sha256: abc"), [], "must be 64 hexadecimal digits"),
        (block(f"gs://m/{NAMES[3]}"), [], "is built for torch 2.8; the image has Python 3.11"),
        (block("gs://m/other-1.0-py3-none-any.whl"), [], "is a wheel of other, not of flash-attn"),
        (block(f"gs://m/{FITS}", ', version: "2.8.2"'), [], "that `source` names is 2.8.3"),
        (block("gs://m/flash-attn.whl"), [], "is not the name of a wheel"),
        (block("gs://m/w", '}, {name: flash-attn, source: "gs://m/w"'), [],
         "there is already a wheel 'flash-attn'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_without_asking_anybody(
    tmp_path: Path, text: str, overrides: list[str], words: str
) -> None:
    with pytest.raises(RecipeErrors) as caught:
        load(tmp_path, HEAD + text, *overrides)
    assert any(words in one for one in caught.value.problems)
    assert all("r.yaml:" in one or "--set" in one for one in caught.value.problems)


def test_here_the_python_that_is_there_is_used(tmp_path: Path) -> None:
    text = HEAD.replace("artifacts", "#").replace("vertex: {", "#").replace("vertex", "local")
    with pytest.raises(RecipeErrors, match="backend 'local' uses the Python that is there"):
        load(tmp_path, text.replace("gs://bkt/t.jsonl", "r.yaml") + block("gs://m/w"))
    text = HEAD + block("gs://m/w")
    assert wheel_of(load(tmp_path, text)).source == "gs://m/w"
    moved = recipe.load(tmp_path / "r.yaml", on="local", environ={}).recipe
    assert moved.stages[0].hardware.environment is None  # what only a cloud needs goes


def test_the_capability_of_every_nvidia_gpu_is_known() -> None:
    unknown = [
        kind.name for kind in hardware.KINDS if kind.vendor == "nvidia" and not kind.capability
    ]
    assert not unknown and all(k.capability == 0 for k in hardware.KINDS if k.vendor != "nvidia")


def test_torch_here_and_in_the_job_is_the_same_range() -> None:
    assert wheels.TORCH == TORCH


# Mirrors.


def test_a_wheel_with_its_sha256_asks_nobody(tmp_path: Path) -> None:
    source = f"gs://nobody-has-this/{FITS}"
    made = load(tmp_path, HEAD + block(source, f", sha256: {'AB' * 32}"))
    assert resolved(made) is made and wheel_of(made).source == source


def test_a_folder_of_this_machine_is_read_and_its_wheel_uploaded_once(tmp_path: Path) -> None:
    sums = mirror(tmp_path / "w", *NAMES)
    made = resolved(load(tmp_path, HEAD + block("./w")))
    assert wheel_of(made) == Wheel("flash-attn", str(tmp_path / "w" / FITS), "2.8.3", sums[FITS])
    env = environment()
    spec = planning.job_spec(
        made.recipe, "0f", "one-0f", 0, "gs://bkt/runs/one", tmp_path, BUNDLE, "ann", env,
    )  # fmt: skip
    (offer,) = VertexBackend().offers(spec.hardware, env)
    _, wheel, boot, _ = VertexBackend().plan(spec, offer).intents
    uri = f"gs://bkt/launch/wheels/{sums[FITS]}/{FITS}"
    assert wheel.name == uri and wheel.request["file"] == str(tmp_path / "w" / FITS)
    assert not wheel.billable and "ifGenerationMatch=0" in wheel.request["url"]
    assert boot.request["json"]["environment"] is True
    assert boot.request["json"]["wheels"] == [
        {"name": "flash-attn", "url": uri, "sha256": sums[FITS]}
    ]


def test_without_wheels_the_boot_specification_has_none(tmp_path: Path) -> None:
    env = environment()
    made = load(tmp_path, HEAD)
    assert resolved(made) is made
    spec = planning.job_spec(
        made.recipe, "0f", "one-0f", 0, "gs://bkt/runs/one", tmp_path, BUNDLE, "ann", env,
    )  # fmt: skip
    (offer,) = VertexBackend().offers(spec.hardware, env)
    boot = VertexBackend().plan(spec, offer).intents[1].request["json"]
    assert "wheels" not in boot and boot["environment"] is True and "environment" not in spec.boot


def test_what_was_chosen_stays_chosen(tmp_path: Path) -> None:
    """The journal's recipe names the file: a relaunch, and a resume with --set, take the same."""
    sums = mirror(tmp_path / "w", FITS)
    written = load(tmp_path, HEAD + block("./w"))
    made = resolved(written)
    assert made.fingerprint == written.fingerprint and made.canonical != written.canonical
    mirror(tmp_path / "w", FITS.replace("2.8.3", "2.8.4"))
    recorded = recipe_of(json.loads(json.dumps(made.canonical)), "the journal")
    assert recorded == made.recipe
    assert wheels.shipped(recorded.stages[0].hardware.environment)[0]["sha256"] == sums[FITS]
    (tmp_path / "again.yaml").write_text(start.as_yaml(made.recipe))
    again = resolved(recipe.load(tmp_path / "again.yaml", ["train.lr=1.0e-3"], environ={}))
    assert wheel_of(again) == wheel_of(made)
    assert wheel_of(resolved(written)).version == "2.8.4"  # another run takes the newer one


def test_stages_of_one_environment_stay_one_job(tmp_path: Path) -> None:
    mirror(tmp_path / "w", FITS)
    text = HEAD.replace("stage: pretrain\n", "")
    stages = "pipeline:\n- {id: a, stage: pretrain}\n- {id: b, stage: pretrain}\n"
    made = resolved(load(tmp_path, text + block("./w") + stages))
    assert len(planning.jobs(made.recipe)) == 1


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """gs://wheels on the rehearsal's server."""
    pytest.importorskip("google.cloud.storage", reason="gs:// needs the extra `google`")
    from launcher.rehearsal.gcs import GcsServer
    from tests.trainer.remote import environment as variables

    with GcsServer() as server, variables(STORAGE_EMULATOR_HOST=server.url):
        server.objects.create_bucket("wheels", {})
        yield server


@pytest.mark.parametrize(
    ("beside", "content"),
    [
        ("SHA256SUMS", "{other}  other.whl\n{sum} *./{file}\n"),
        ("{file}.sha256", "{sum}\n"),
        ("{file}.sha256", "{sum}  {file}\n"),
    ],
)
def test_the_sha256_stands_beside_the_wheel_in_the_bucket(
    tmp_path: Path, bucket: Any, beside: str, content: str
) -> None:
    from trainer.store import open_store

    folder = f"gs://wheels/{hashlib.sha256((beside + content).encode()).hexdigest()[:8]}"
    store, given = open_store(folder), {"file": FITS, "sum": "cd" * 32, "other": "ef" * 32}
    for name in NAMES:
        store.put_bytes(f"torch2.9/{name}", b"wheel")
    text = HEAD + block(f"{folder}/")
    assert f"nothing tells the sha256 of {FITS}: put SHA256SUMS" in problems(tmp_path, text)
    store.put_bytes(f"torch2.9/{beside.format(**given)}", content.format(**given).encode())
    expected = Wheel("flash-attn", f"{folder}/torch2.9/{FITS}", "2.8.3", "cd" * 32)
    assert wheel_of(resolved(load(tmp_path, text))) == expected
    named = HEAD + block(expected.source)  # the file itself, without its sha256
    assert wheel_of(resolved(load(tmp_path, named))) == expected


def test_a_wheel_of_this_machine_reaches_the_bucket_once(tmp_path: Path, bucket: Any) -> None:
    from launcher.backends.vertex import jobs

    sums = mirror(tmp_path / "w", FITS)
    text = HEAD.replace("gs://bkt/runs", "gs://wheels/runs") + block("./w")
    made, env = resolved(load(tmp_path, text)), environment()
    environ = {"STORAGE_EMULATOR_HOST": bucket.url, "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true"}
    env = replace(env, environ=environ)
    spec = planning.job_spec(
        made.recipe, "0f", "one-0f", 0, "gs://wheels/runs/one", tmp_path, BUNDLE, "ann", env,
    )  # fmt: skip
    (offer,) = VertexBackend().offers(spec.hardware, env)
    intent = VertexBackend().plan(spec, offer).intents[1]
    jobs.upload(intent, env)
    (tmp_path / "w" / FITS).unlink()  # a relaunch from another machine does not have it
    jobs.upload(intent, env)
    key = f"launch/wheels/{sums[FITS]}/{FITS}"
    from trainer.store import open_store

    assert open_store("gs://wheels").checksum(key) == sums[FITS]


def test_a_bucket_that_is_not_ours_or_not_there_is_an_error_of_access_or_of_the_recipe(
    tmp_path: Path, bucket: Any
) -> None:
    bucket.objects.create_bucket("theirs", {})
    bucket.objects.denied.add("theirs")
    with pytest.raises(Denied, match="theirs"):
        resolved(load(tmp_path, HEAD + block("gs://theirs/w")))
    bucket.objects.denied.clear()
    with pytest.raises(BadRequest, match="there is no bucket absent"):
        resolved(load(tmp_path, HEAD + block("gs://absent/w")))


@contextlib.contextmanager
def https(folder: Path, pages: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server on this machine, with a certificate that this process trusts."""
    cert = certificate(folder, monkeypatch)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path)
            status = 404 if page is None else 503 if page == b"503" else 200
            self.send_response(status)
            self.send_header("Content-Length", str(len(page or b"")))
            self.end_headers()
            self.wfile.write(page or b"")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"https://localhost:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def certificate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datetime

    pytest.importorskip("cryptography", reason="makes the certificate of the tests' server")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    path = folder / "cert.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )  # fmt: skip
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    for variable in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    return path


def test_a_web_servers_listing_and_an_index_with_hashes_are_mirrors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quoted = FITS.replace("+", "%2B")
    pages = {
        "/plain/": f'<a href="{quoted}">x</a><a href="../up.whl">up</a>'.encode(),
        f"/plain/{quoted}.sha256": b"ab" * 32,
        "/index/": f'<a href="/files/{quoted}#sha256={"cd" * 32}">x</a>'.encode(),
        "/bare/": f'<a href="{quoted}">x</a>'.encode(),
        "/down/": b"503",
    }
    with https(tmp_path, pages, monkeypatch) as url:
        plain = wheel_of(resolved(load(tmp_path, HEAD + block(f"{url}/plain"))))
        assert (plain.source, plain.sha256) == (f"{url}/plain/{quoted}", "ab" * 32)
        index = wheel_of(resolved(load(tmp_path, HEAD + block(f"{url}/index/"))))
        assert (index.source, index.sha256) == (f"{url}/files/{quoted}", "cd" * 32)
        named = wheel_of(resolved(load(tmp_path, HEAD + block(f"{url}/plain/{quoted}"))))
        assert named == plain
        assert "nothing tells the sha256" in problems(tmp_path, HEAD + block(f"{url}/bare/"))
        assert "there is no page" in problems(tmp_path, HEAD + block(f"{url}/absent"))
        with pytest.raises(Transient, match="503"):
            resolved(load(tmp_path, HEAD + block(f"{url}/down")))
    with pytest.raises(Transient, match="cannot be read"):
        resolved(load(tmp_path, HEAD + block(f"{url}/plain")))


def test_plan_chooses_too_and_creates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCH_HOME", str(tmp_path / "home"))
    sums = mirror(tmp_path / "w", FITS)
    (tmp_path / "r.yaml").write_text(HEAD + block("./w"))
    made = api.plan(tmp_path / "r.yaml")
    assert [intent.kind for intent in made.jobs[0].intents] == [
        "gcs_object", "gcs_object", "gcs_object", "custom_job",
    ]  # fmt: skip
    assert sums[FITS] in made.jobs[0].intents[1].name
    assert any(f"job 0 installs flash-attn from {tmp_path}/w/{FITS}" in n for n in made.notes)
    (tmp_path / "w" / FITS).unlink()
    with pytest.raises(RecipeErrors, match="no wheel of flash-attn"):
        api.plan(tmp_path / "r.yaml")
