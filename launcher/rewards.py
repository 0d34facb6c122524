"""Whether the functions that `grpo.rewards` names travel with the run, as far as files say: a name
that is misspelt is told before a machine is rented. Nothing is imported here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Optional

from launcher import code
from launcher.spec import Code, Stage
from trainer import config
from trainer.config import Problem, nearest

#: The folder of the package that travels with every run.
_TRAINER = Path(config.__file__).parent


def problems(stage: Stage, sent: Optional[Code]) -> Iterator[Problem]:
    """What is wrong with the stage's rewards beside `sent`, the recipe's `code`. Modules that do
    not belong to it may be installed where the job runs, so they are left to the trainer; code that
    names its archive is not read again."""
    if stage.grpo is None or (sent is not None and sent.sha256 is not None):
        return
    try:
        files = code.files(sent) if sent is not None else {}
    except code.Wrong:  # told where it is written
        return
    for index, name in enumerate(stage.grpo.rewards):
        where, _, function = name.rpartition(":")
        if where.endswith(".py"):
            what = _in_file(where, function, sent, files, stage.hardware.backend == "local")
        else:
            what = _in_module(where, function, sent, files)
        if what is not None:
            yield ("grpo", "rewards", index), what


def _in_file(
    where: str, function: str, sent: Optional[Code], files: Mapping[str, Path], here: bool
) -> Optional[str]:
    if where.startswith("/"):
        if not here:
            return None
        path = Path(where)
        return _lacks(path, function) if path.is_file() else f"no such file: {path}"
    if sent is None:
        return f"'{where}' does not travel with the run; name its folder: code: {{path: .}}"
    path_in = PurePosixPath(where).as_posix()
    if path_in not in files:
        return _not_sent(path_in, sent, files)
    return _lacks(files[path_in], function)


def _in_module(
    where: str, function: str, sent: Optional[Code], files: Mapping[str, Path]
) -> Optional[str]:
    stem = where.replace(".", "/")
    if where.partition(".")[0] == "trainer":
        own = _TRAINER.parent / f"{stem}.py"
        return _lacks(own, function) if own.is_file() else f"the trainer has no module `{where}`"
    found = files.get(f"{stem}.py") or files.get(f"{stem}/__init__.py")
    if found is not None:
        return _lacks(found, function)
    if sent is None:
        return None
    top = stem.partition("/")[0]
    left_out = (Path(sent.path) / f"{stem}.py").is_file()
    if left_out or ("/" in stem and any(name.startswith(f"{top}/") for name in files)):
        return _not_sent(f"{stem}.py", sent, files)
    return None


def _not_sent(name: str, sent: Code, files: Mapping[str, Path]) -> str:
    near = nearest(name, [file for file in files if file.endswith(".py")])
    return f"'{name}' is not among the files that `code` sends from {sent.path}; {near}"


def _lacks(path: Path, function: str) -> Optional[str]:
    """Why `function` is not in a file; None: it is, or the file may take it from elsewhere."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        return f"{path}{line}: is no Python: {said}"
    except OSError as error:
        return f"cannot read {path}: {error.strerror}"
    there: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            there.add(node.name)
        elif isinstance(node, ast.Name):
            there.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            there |= {alias.asname or alias.name for alias in node.names}
    if function in there or there & {"*", "__getattr__", "globals", "exec", "setattr"}:
        return None
    names = (node.name for node in tree.body if isinstance(node, ast.FunctionDef))
    functions = [name for name in names if not name.startswith("_")]
    rest = nearest(function, functions) if functions else "it defines no function"
    return f"{path.name} has no `{function}`; {rest}"
