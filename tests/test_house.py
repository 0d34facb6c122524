"""The rules of the house that no type checker sees: who may import whom, size, packaging, pins."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("infra", "launcher", "trainer")
#: The only modules of the trainer that the launcher may import; they know the standard library.
LEAVES = (
    "trainer.config", "trainer.config_data", "trainer.config_model", "trainer.config_objectives",
    "trainer.config_train", "trainer.phases", "trainer.loading", "trainer.packages",
    "trainer.store", "trainer.boot",
)  # fmt: skip
MOST_LINES = 500

#: (importing package, what it may import of the two others, with all below it).
ARROWS = [("launcher", ("infra", *LEAVES)), ("trainer", ()), ("infra", ())]

PRODUCT = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
OTHERS = sorted(path for top in ("tests", "benchmarks") for path in (ROOT / top).rglob("*.py"))


@pytest.mark.parametrize(("package", "allowed"), ARROWS, ids=[name for name, _ in ARROWS])
def test_packages_import_each_other_only_along_the_arrows(
    package: str, allowed: tuple[str, ...]
) -> None:
    others = set(PACKAGES) - {package}
    # The bare package tells where its files are; it is as light as its leaves (the next test).
    bare = "trainer" if package == "launcher" else None
    wrong = [
        f"{_shown(path)}:{line}: imports {name}"
        for path in _modules(package)
        for line, name in _imports(path)
        if name.split(".")[0] in others and name != bare and not _within(name, allowed)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_leaves_of_the_trainer_need_the_standard_library_only() -> None:
    standard = sys.stdlib_module_names | {"__future__"}
    wrong = [
        f"{_shown(path)}:{line}: imports {name}"
        for path in (_file("trainer"), *map(_file, LEAVES))
        for line, name in _imports(path)
        if name.split(".")[0] not in standard and not _within(name, LEAVES)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("statement", "seen"),
    [
        ("import trainer.loop", "trainer.loop"),
        ("from trainer import loop", "trainer.loop"),
        ("from trainer.data import read as r", "trainer.data.read"),
        ("def f():\n    from trainer.loop import Loop", "trainer.loop.Loop"),
        ("import_module('trainer.loop')", "trainer.loop"),
        ("importlib.import_module('trainer.loop')", "trainer.loop"),
    ],
)
def test_the_reader_of_imports_sees_every_form(tmp_path: Path, statement: str, seen: str) -> None:
    module = tmp_path / "module.py"
    module.write_text(statement)
    assert seen in [name for _, name in _imports(module)]


def test_no_file_of_the_product_is_longer_than_500_lines() -> None:
    lengths = {_shown(path): len(path.read_text().splitlines()) for path in PRODUCT}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


def test_every_module_says_what_lives_there() -> None:
    silent = [
        _shown(path)
        for path in (*PRODUCT, *OTHERS)
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def test_no_file_names_the_host_of_a_package_registry() -> None:
    hosts = [
        "pypi" + ".org", "python" + "hosted.org", "npmjs" + ".org", "download.pytorch" + ".org",
        "deb.debian" + ".org", "conda.ana" + "conda.org", "proxy.golang" + ".org",
    ]  # fmt: skip
    pattern = re.compile("|".join(map(re.escape, hosts)))
    wrong = [
        f"{_shown(path)}:{number}"
        for path in _tracked()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not wrong


def test_a_wheel_holds_every_package_and_the_shipped_recipes() -> None:
    packaging = _pyproject()["tool"]["setuptools"]
    in_tree = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in PRODUCT
        if path.name == "__init__.py"
    }
    assert set(packaging["packages"]) == in_tree | {"launcher.recipes"}
    assert packaging["package-dir"] == {"launcher.recipes": "recipes"}
    assert packaging["package-data"]["launcher.recipes"] == ["*.yaml"]
    kinds = (".csv", ".json", ".typed")
    data = [path for path in (ROOT / "launcher").rglob("*") if path.suffix in kinds]
    patterns = packaging["package-data"]["launcher"]
    missing = [p for p in data if not any(p in (ROOT / "launcher").glob(g) for g in patterns)]
    assert data
    assert not missing


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_requirement_has_one_exact_pin_that_it_accepts(python: str) -> None:
    pins = _pins(python)
    project = _pyproject()["project"]
    extras = project["optional-dependencies"]
    wrong = []
    for text in (*project["dependencies"], *(line for lines in extras.values() for line in lines)):
        wanted = Requirement(text)
        versions = pins.get(canonicalize_name(wanted.name), [])
        if len(versions) != 1 or not wanted.specifier.contains(versions[0]):
            wrong.append(f"{text}: pinned {versions}")
    assert not wrong


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_no_package_is_pinned_twice_for_one_python(python: str) -> None:
    assert not {name: found for name, found in _pins(python).items() if len(found) > 1}


def _pins(python: str) -> dict[str, list[str]]:
    """Package -> versions that constraints.txt gives for this Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    found: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        (exact,) = pin.specifier
        assert exact.operator == "==", line
        if pin.marker is None or pin.marker.evaluate(environment):
            found.setdefault(canonicalize_name(pin.name), []).append(exact.version)
    return found


def _modules(package: str) -> Iterator[Path]:
    return (path for path in PRODUCT if path.relative_to(ROOT).parts[0] == package)


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, wherever it stands; `from a import b` counts
    as `a.b`, since b may be a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(path, node)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            name = called.id if isinstance(called, ast.Name) else called
            first = node.args[0]
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def _absolute(path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = path.relative_to(ROOT).parts[: -node.level]
    return ".".join((*package, *([node.module] if node.module else [])))


def _within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def _file(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _tracked() -> list[Path]:
    """Files of the repository: git's, or (in an unpacked archive) all but caches."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [
            path for path in ROOT.rglob("*")
            if not {".git", ".venv", "__pycache__", "build"} & set(path.relative_to(ROOT).parts)
        ]  # fmt: skip
    return [path for path in paths if path.is_file()]


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
