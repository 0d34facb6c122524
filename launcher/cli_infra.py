"""Commands about the foundations, what outlives a run: parse and call, as in `launcher.cli`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from launcher.arguments import JsonOption, RecipeArgument, SetOption, YesOption

app = typer.Typer(
    help="Make and keep what outlives runs: bucket, service account, roles, secrets, registry.",
    rich_markup_mode=None,
    invoke_without_command=True,
)
_UnlockOption = Annotated[
    bool, typer.Option("--unlock", help="Break the lock of another update, after asking.")
]


@app.callback()
def _infra(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        from launcher import console

        console.say(context.get_help())


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> int:
    """Say what `infra up` would create, change or delete for RECIPE."""
    from launcher.commands import infra

    return infra.plan(recipe, overrides or (), yes=yes, as_json=as_json)


@app.command()
def up(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    yes: YesOption = False,
    unlock: _UnlockOption = False,
    as_json: JsonOption = False,
) -> int:
    """Make the foundations of RECIPE, or bring them up to date; after an interruption, go on.

    Ctrl-C finishes what has begun and stops; a second one aborts, a third kills.
    """
    from launcher.commands import infra

    return infra.up(recipe, overrides or (), yes=yes, unlock=unlock, as_json=as_json)


@app.command()
def destroy(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    forget: Annotated[
        Optional[str],
        typer.Option("--forget", metavar="NAME", help="Another recipe of that bucket instead."),
    ] = None,
    yes: YesOption = False,
    unlock: _UnlockOption = False,
    as_json: JsonOption = False,
) -> int:
    """Delete what `infra up` made for RECIPE and no other recipe of its bucket declares.

    The bucket stays unless the recipe says otherwise. Exit code 0 only when nothing but that is
    left, else 7.
    """
    from launcher.commands import infra

    return infra.destroy(
        recipe, overrides or (), forget=forget, yes=yes, unlock=unlock, as_json=as_json
    )


@app.command()
def status(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Ask the cloud what differs from the state.")
    ] = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> int:
    """Show what was made for RECIPE, the last update, and what an interruption left open."""
    from launcher.commands import infra

    return infra.status(recipe, overrides or (), refresh=refresh, yes=yes, as_json=as_json)


@app.command()
def export(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    to: Annotated[
        Optional[str], typer.Option("--to", metavar="FOLDER", help="Default: ./infra-RECIPE")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Write the foundations of RECIPE as a Pulumi project of your own."""
    from launcher.commands import infra

    return infra.export(recipe, overrides or (), to=to, as_json=as_json)


@app.command("set-secret")
def set_secret(
    recipe: RecipeArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A secret that RECIPE names.")],
    overrides: SetOption = None,
    from_env: Annotated[
        Optional[str], typer.Option("--from-env", metavar="VARIABLE", help="Take its value.")
    ] = None,
    from_file: Annotated[
        Optional[str], typer.Option("--from-file", metavar="FILE", help="Take what it holds.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Give a secret of RECIPE its value, from standard input unless an option says otherwise."""
    from launcher.commands import infra

    return infra.set_secret(
        recipe, name, overrides or (), from_env=from_env, from_file=from_file, as_json=as_json
    )
