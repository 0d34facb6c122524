"""The foundations written down as a Pulumi project of its own, which needs nothing of launch.

It declares the very resources of `infra.google.program`, under the same names, so that whoever
takes it over may go on with the same stack, or import what is there.
"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from infra.google import (
    ACCOUNT,
    BUCKET,
    REPOSITORY,
    SECRET,
    SERVICE,
    Declared,
    Foundations,
    config,
    outputs,
    resources,
)

#: What the project was written for; the first is also what Automation needs here.
REQUIREMENTS = ("pulumi>=3.231,<4", "pulumi-gcp>=10.0,<11")
_SHORT = 68
_HEADINGS = {
    SERVICE: "APIs. They stay on after a destroy: others of the project may use them.",
    BUCKET: "Checkpoints, logs and records of runs.",
    ACCOUNT: "Whom jobs act as.",
    SECRET: "Secrets without a value: none is in any state.",
    REPOSITORY: "Images of jobs.",
}
_GRANTS = "Who may do what. Each adds one member to one role and leaves all others alone."


def write(
    f: Foundations, folder: Path, *, project: str = "launch", stack: Optional[str] = None
) -> list[Path]:
    """Write the project for `f` into `folder`, which is made if need be, and say which files.
    `project` and `stack` (default: `f.name`) are Pulumi's names.

    Errors: `FileExistsError` before anything is written, naming a file that would be replaced."""
    stack = stack or f.name
    texts = {
        "Pulumi.yaml": _project_file(f, project),
        f"Pulumi.{stack}.yaml": _stack_file(f),
        "__main__.py": program_text(f),
        "requirements.txt": "".join(f"{line}\n" for line in REQUIREMENTS),
        "README.md": _readme(f, stack),
    }
    for name in texts:
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} is there already; name an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def program_text(f: Foundations) -> str:
    """`__main__.py`: one call for each resource, in their order."""
    declared = resources(f)
    needed = {name for one in declared for name in one.after}
    variables = _variables([one.name for one in declared if one.name in needed])
    blocks = [
        f'"""The foundations of {f.name} on Google Cloud: {_counted(declared)}."""',
        "import pulumi\nimport pulumi_gcp as gcp",
    ]
    heading = ""
    for one in declared:
        before, heading = heading, _HEADINGS.get(one.type_token, _GRANTS)
        comment = f"# {heading}\n" if heading != before else ""
        blocks.append(comment + _call(one, variables))
    exports = [
        f"pulumi.export({_fitted([_literal(name), _literal(value)])})"
        for name, value in outputs(f).items()
    ]
    return "\n\n".join([*blocks, "\n".join(exports)]) + "\n"


def _call(one: Declared, variables: Mapping[str, str]) -> str:
    _, module, name = one.type_token.split(":")
    after = ", ".join(variables[other] for other in one.after)
    options = [f"depends_on=[{after}]"] if after else []
    options += ["retain_on_delete=True"] if one.retain else []
    lines = [_literal(one.name)]
    lines += [f"{key}={_literal(value)}" for key, value in one.inputs.items()]
    lines += [f"opts=pulumi.ResourceOptions({', '.join(options)})"] if options else []
    target = f"{variables[one.name]} = " if one.name in variables else ""
    return f"{target}gcp.{module.partition('/')[0]}.{name}({_listed(lines)})"


def _literal(value: Any) -> str:
    """A literal of Python: in one line where that is short, else one item a line."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        items, signs = [f"{_literal(k)}: {_literal(v)}" for k, v in value.items()], "{}"
    elif isinstance(value, (list, tuple)):
        items, signs = [_literal(item) for item in value], "[]"
    else:
        return repr(value)
    return f"{signs[0]}{_fitted(items)}{signs[1]}"


def _fitted(items: Sequence[str]) -> str:
    line = ", ".join(items)
    return line if len(line) <= _SHORT and "\n" not in line else _listed(items)


def _listed(items: Sequence[str]) -> str:
    return "\n" + textwrap.indent("".join(f"{item},\n" for item in items), "    ")


def _variables(names: Sequence[str]) -> dict[str, str]:
    """A variable for each name; names that differ only in signs get a number."""
    given: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"\W+", "_", name, flags=re.ASCII)
        taken, number = set(given.values()), 2
        variable = plain
        while variable in taken:
            variable, number = f"{plain}_{number}", number + 1
        given[name] = variable
    return given


def _project_file(f: Foundations, project: str) -> str:
    return (
        f"name: {project}\n"
        f"description: The foundations of {f.name} on Google Cloud\n"
        "runtime:\n  name: python\n  options:\n    virtualenv: .venv\n"
    )


def _stack_file(f: Foundations) -> str:
    return "config:\n" + "".join(f"  {key}: {value}\n" for key, value in config(f).items())


def _readme(f: Foundations, stack: str) -> str:
    parts = [
        f"# The foundations of {f.name}",
        "A Pulumi project of its own: change it as you like. It declares "
        f"{_counted(resources(f))} of project {f.project}.",
        "```\n"
        "pulumi login                # or: pulumi login gs://BUCKET, or --local\n"
        f"pulumi stack select --create {stack}\n"
        "pulumi preview\n"
        "pulumi up\n"
        "```",
    ]
    if f.secrets:
        parts.append(
            "Secrets are declared without a value, so that none is in any state. Give each one:\n\n"
            "```\n"
            + "".join(
                f"gcloud secrets versions add {name} --project={f.project} --data-file=-\n"
                for name in f.secrets
            )
            + "```"
        )
    if f.missing:
        parts.append("Not declared here:\n\n" + "\n".join(f"* {line}" for line in f.missing))
    parts.append(
        "A stack that is new takes over what is there already with these, one for each; leave out "
        "what is not there.\n\n"
        "```\n" + "".join(f"{line}\n" for line in _imports(f)) + "```"
    )
    if f.bucket and f.retain_bucket:
        parts.append(f"`pulumi destroy` leaves the bucket gs://{f.bucket} where it is.")
    return "\n\n".join(parts) + "\n"


def _imports(f: Foundations) -> Iterator[str]:
    for one in resources(f):
        words = (one.type_token, one.name, one.import_id)
        yield shlex.join(("pulumi", "import", "--generate-code=false", *words))


def _counted(declared: Sequence[Declared]) -> str:
    return f"{len(declared)} resource{'' if len(declared) == 1 else 's'}"
