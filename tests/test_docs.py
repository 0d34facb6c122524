"""The documentation cannot rot: command lines parse, links lead somewhere, tables are whole."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from launcher import drafts
from launcher.backends.base import Held, Phase
from launcher.cli import app
from launcher.errors import Exit
from launcher.spec import (
    Budget,
    Code,
    Environment,
    Expected,
    Gate,
    Hardware,
    Infra,
    Local,
    Notify,
    Retry,
    Vertex,
    Wheel,
)
from trainer.config import (
    NEEDS,
    Adapter,
    Architecture,
    Data,
    Distill,
    Evaluate,
    Export,
    Grpo,
    Hub,
    KeepLogits,
    Merge,
    Model,
    Preference,
    Sdce,
    Smoke,
    Source,
    Targets,
    Tokenizer,
    ToolUse,
    Train,
)
from trainer.config import Phase as LengthPhase

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

#: Section of docs/recipes.md -> the class whose fields its table lists.
SECTIONS = {
    "model": Model,
    "model.architecture": Architecture,
    "model.adapter": Adapter,
    "data": Data,
    "data.curriculum": LengthPhase,
    "data.tool_use": ToolUse,
    "data.train and data.validation": Source,
    "data.train.hf": Hub,
    "train": Train,
    "kd": Distill,
    "kd.keep_logits": KeepLogits,
    "sdce": Sdce,
    "preference": Preference,
    "grpo": Grpo,
    "targets": Targets,
    "tokenizer": Tokenizer,
    "evaluate": Evaluate,
    "merge": Merge,
    "export": Export,
    "smoke": Smoke,
    "hardware": Hardware,
    "forecast": Expected,
    "hardware.environment": Environment,
    "hardware.environment.wheels": Wheel,
    "hardware.local": Local,
    "hardware.vertex": Vertex,
    "budget": Budget,
    "retry": Retry,
    "code": Code,
    "infra": Infra,
    "notify": Notify,
    "gate": Gate,
}
_COMMAND = re.compile(r"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )*launch(?: |$)")


def test_every_command_line_in_the_pages_is_one_that_launch_takes() -> None:
    checked, wrong = 0, []
    for page in PAGES:
        for line, text, whole in _command_lines(page):
            checked += 1
            problem = _refused(text, whole)
            if problem:
                wrong.append(f"{page.name}:{line}: `{text}`: {problem}")
    assert not wrong, "\n".join(wrong)
    assert checked > 30


@pytest.mark.parametrize(
    "text",
    [
        "launch fly RUN",
        "launch up quickstart --fast",
        "launch logs RUN -z",
        "launch stop",
        "launch init",
    ],
)
def test_a_command_line_that_launch_does_not_take_is_noticed(text: str) -> None:
    assert _refused(text)


def test_the_python_example_of_the_readme_fits_its_own_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import launcher

    text = (ROOT / "README.md").read_text()
    started = re.search(r"launch init (\S+) (\S+)", text)
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert started and example
    shutil.copy(ROOT / "recipes" / f"{started[1].replace('-', '_')}.yaml", tmp_path / started[2])
    monkeypatch.chdir(tmp_path)
    validated: list[object] = []

    def up(path: str, **options: Any) -> None:
        validated.append(launcher.validate(path, **options))

    monkeypatch.setattr(launcher, "up", up)
    exec(example[1], {})
    assert len(validated) == 1


def test_every_command_is_shown_in_the_pages() -> None:
    shown = {
        text.split()[1] for page in PAGES for _, text, _ in _command_lines(page) if " " in text
    }
    hidden = {"drive"}  # what `up` starts by itself
    assert set(_group().commands) - shown - hidden == set()


def test_every_relative_link_leads_to_a_file_and_a_heading() -> None:
    wrong = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in target or target.startswith("mailto:"):
                continue
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            if not path.exists() or (anchor and anchor not in _anchors(path)):
                wrong.append(f"{page.name}: {target}")
    assert not wrong


@pytest.mark.parametrize("section", SECTIONS)
def test_the_tables_list_the_keys_of_a_recipe_with_their_defaults(section: str) -> None:
    documented = _table(ROOT / "docs" / "recipes.md", section)
    fields = {field.name: field for field in dataclasses.fields(SECTIONS[section])}
    assert list(documented) == list(fields)
    for name, default in documented.items():
        _agrees(fields[name], default)


def test_the_tables_list_the_keys_at_the_top_and_in_a_pipeline() -> None:
    page = ROOT / "docs" / "recipes.md"
    assert set(_table(page, "The keys of a recipe")) >= set(drafts.TOP)
    assert set(_table(page, "The keys of a recipe")) - set(NEEDS) <= set(drafts.TOP)
    assert set(_table(page, "Pipelines")) == set(drafts.ENTRY)


def test_the_table_of_stages_says_what_each_one_needs() -> None:
    rows = _table(ROOT / "docs" / "recipes.md", "The keys of a recipe", first="stage")
    assert {name: set(re.findall(r"`(\w+)`", needs)) for name, needs in rows.items()} == {
        name: set(needed) for name, (needed, _) in NEEDS.items()
    }


def test_the_states_and_exit_codes_are_all_explained() -> None:
    page = ROOT / "docs" / "run.md"
    assert list(_table(page, "States", first="phase")) == [phase.value for phase in Phase]
    assert list(_table(page, "States", first="held")) == [held.value for held in Held]
    assert list(_table(page, "Exit codes", first="code")) == [str(code.value) for code in Exit]


def _group() -> Any:
    return typer.main.get_command(app)


def _command_lines(page: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, text, whether it is meant to be typed as it is) of `launch ...`: in code blocks it is,
    while a code span in a sentence may only name a command."""
    fenced = False
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced and _COMMAND.match(line):
            # A note stands behind the command, two spaces away or after a hash.
            text = re.split(r"\s{2,}|\s#", line.strip().removeprefix("$ "))[0]
            yield number, text, True
        elif not fenced:
            for span in re.findall(r"`([^`]+)`", line):
                if _COMMAND.match(span) and span.strip() != "launch":
                    yield number, span.strip(), False


def _refused(text: str, whole: bool = True) -> str:
    """Why launch would not take this command line; empty when it would."""
    words = shlex.split(text)
    words = words[words.index("launch") + 1 :]
    group = _group()
    context = group.make_context("launch", [], resilient_parsing=True)
    if words[0].startswith("-"):
        return _unparsed(group, context, words, whole)
    command = group.get_command(context, words[0])
    if command is None:
        return f"no command '{words[0]}'"
    words = words[1:]
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return _unparsed(command, context, words, whole)


def _unparsed(command: Any, context: Any, words: list[str], whole: bool) -> str:
    inner = type(context)(command, parent=context, info_name=command.name)
    try:
        values, rest, _ = command.make_parser(inner).parse_args(list(words))
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return str(error.format_message())
    if rest:
        return f"too many words: {rest}"
    missing = [p.name for p in command.params if p.required and values.get(p.name) in (None, ())]
    return f"missing {missing}" if missing and whole else ""


def _table(page: Path, section: str, first: str = "key") -> dict[str, str]:
    """The table under a heading whose first column is called `first`: first cell -> second."""
    (body,) = re.findall(
        rf"^#+ {re.escape(section)}\n(.*?)(?=^#+ |\Z)", page.read_text(), re.MULTILINE | re.DOTALL
    )
    (table,) = re.findall(rf"^\| {first} \|[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)*)", body, re.MULTILINE)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    assert rows
    return {row[0].strip("`"): row[1] for row in rows}


def _agrees(field: Any, documented: str) -> None:
    """A documented default in code is the field's; words stand for defaults found elsewhere."""
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    else:
        default = field.default
    if default is dataclasses.MISSING:
        assert documented == "required", field.name
    elif default is None:
        assert not documented.startswith("`"), field.name
    elif isinstance(default, tuple):
        assert documented == f"`[{', '.join(map(str, default))}]`", field.name
    else:
        written = str(default).lower() if isinstance(default, bool) else str(default)
        assert documented == f"`{written}`", field.name


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}
