"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated, Optional

import typer


def run_names(incomplete: str) -> list[str]:
    from launcher.commands import completion

    return completion.runs(incomplete)


def recipe_names(incomplete: str) -> list[str]:
    from launcher.commands import completion

    return completion.recipes(incomplete)


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a shipped one (launch recipes).",
        autocompletion=recipe_names,
    ),
]
RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run's name, id, the start of one, or the gs:// URI (or folder) of its artifacts.",
        autocompletion=run_names,
    ),
]
SetOption = Annotated[
    Optional[list[str]],
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value: train.lr=1e-4. Repeatable."),
]
OnOption = Annotated[
    Optional[str], typer.Option("--on", metavar="BACKEND", help="Another backend: local, vertex.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DetachOption = Annotated[bool, typer.Option("--detach", "-d", help="Start it and return at once.")]
