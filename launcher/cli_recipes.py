"""Commands about recipes and this machine: parse and call, as in `launcher.cli`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from launcher.arguments import (
    JsonOption,
    OnOption,
    RecipeArgument,
    SetOption,
    recipe_names,
    run_names,
)


def add(app: typer.Typer) -> None:
    """Give `app` these commands."""
    for command in (plan, offers, validate, init, schema, doctor):
        app.command()(command)
    app.command("recipes")(list_recipes)


def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    on: OnOption = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the arithmetic of the forecast.")
    ] = False,
    against: Annotated[
        Optional[str],
        typer.Option(metavar="RUN", help="Compare with this run.", autocompletion=run_names),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Say what `up` would create, what it takes and costs, and how it differs from a live run."""
    from launcher.commands import recipes

    return recipes.plan(
        recipe, overrides or (), on, explain=explain, against=against, as_json=as_json
    )


def offers(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    any_accelerator: Annotated[
        bool, typer.Option("--any", help="Other accelerators too, where the model fits.")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Of each job.")] = 20,
    as_json: JsonOption = False,
) -> int:
    """Compare the places that could run a recipe: fit, speed, hours and dollars, best first."""
    from launcher.commands import offers as command

    return command.offers(
        recipe, overrides or (), any_accelerator=any_accelerator, limit=limit, as_json=as_json
    )


def validate(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    on: OnOption = None,
    as_json: JsonOption = False,
) -> int:
    """Check a recipe; every problem is named with its place in the file."""
    from launcher.commands import recipes

    return recipes.validate(recipe, overrides or (), on, as_json=as_json)


def init(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A shipped recipe.", autocompletion=recipe_names)
    ],
    path: Annotated[Optional[str], typer.Argument(metavar="PATH", help="Where to.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Copy a shipped recipe, to change it."""
    from launcher.commands import recipes

    return recipes.init(name, path, as_json=as_json)


def list_recipes(as_json: JsonOption = False) -> int:
    """List the recipes that come with launch."""
    from launcher.commands import recipes

    return recipes.listing(as_json=as_json)


def schema() -> int:
    """Print the JSON Schema of recipes, for editors."""
    from launcher.commands import recipes

    return recipes.schema()


def doctor(
    recipe: Annotated[
        Optional[str],
        typer.Argument(metavar="RECIPE", help="Check for it too.", autocompletion=recipe_names),
    ] = None,
    overrides: SetOption = None,
    on: OnOption = None,
    as_json: JsonOption = False,
) -> int:
    """Check this machine, and a recipe; each problem comes with its fix."""
    from launcher.commands import recipes

    return recipes.doctor(recipe, overrides or (), on, as_json=as_json)
