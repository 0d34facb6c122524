"""The command line: parse, call, print. What a command does is in `launcher.commands`, loaded when
that command runs, so that `launch --help` stays as quick as its parser.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from launcher import cli_infra, cli_recipes
from launcher.arguments import (
    DetachOption,
    JsonOption,
    OnOption,
    RecipeArgument,
    RunArgument,
    SetOption,
    YesOption,
    run_names,
)
from launcher.errors import Exit, LaunchError, UsageError


class _Commands(TyperGroup):
    """All commands, listed by what they are about."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, names in _SECTIONS.items():
            rows = [(name, self.commands[name].get_short_help_str(limit=90)) for name in names]
            with formatter.section(title):
                formatter.write_dl(rows)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """A word of another tool, or a recipe where its verb was forgotten, gets the right verb."""
        if args and args[0] not in self.commands and (hint := _meant(args[0])):
            raise UsageError(f"no command '{args[0]}'; did you mean `{hint}`?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """A reader that went away (`launch logs RUN | head`) is no error."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _ReaderGone from error


class _ReaderGone(Exception):
    pass


_SECTIONS = {
    "Runs": (
        "up", "status", "logs", "stop", "resume", "attach", "teardown", "sweep", "pull", "report",
        "tensorboard", "costs", "drive",
    ),
    "Recipes": ("plan", "offers", "validate", "init", "recipes", "schema"),
    "Foundations": ("infra",),
    "This machine": ("doctor",),
}  # fmt: skip

#: Verbs of other tools -> ours.
_OTHER_WORDS = {
    "run": "launch up RECIPE", "start": "launch up RECIPE", "train": "launch up RECIPE",
    "launch": "launch up RECIPE", "cancel": "launch stop RUN", "kill": "launch teardown RUN",
    "down": "launch teardown RUN", "delete": "launch teardown RUN", "rm": "launch teardown RUN",
    "ps": "launch status", "list": "launch status", "ls": "launch status",
    "queue": "launch status", "log": "launch logs RUN", "new": "launch init NAME",
    "check": "launch validate RECIPE",
}  # fmt: skip

app = typer.Typer(
    cls=_Commands,
    help="Train language models from one recipe: plan it, run it anywhere, take it down again.",
    epilog="Start with: launch up quickstart",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: half the start-up time of the one that rich draws
)


def _version(asked: bool) -> None:
    if asked:
        from launcher import __version__, console

        console.say(f"launch {__version__}")
        raise typer.Exit


@app.callback()
def _launch(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def up(
    recipe: RecipeArgument,
    detach: DetachOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Shrink the model and try two batches, here, offline.")
    ] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Go the whole way of a cloud run, on this machine.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="With --rehearse: keep its folder.")] = False,
    yes: YesOption = False,
    new: Annotated[
        bool, typer.Option("--new", help="Start another run even if this one is live already.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out bad lines of the data, and count them.")
    ] = False,
    overrides: SetOption = None,
    on: OnOption = None,
    as_json: JsonOption = False,
) -> int:
    """Start a run of RECIPE, or attach to a live one; follow it.

    Ctrl-C stops following; the run goes on. The exit code is the run's.
    """
    from launcher.commands import drive

    values = [*(overrides or ()), *(["data.skip_bad=true"] if skip_bad else [])]
    if rehearse:
        from launcher.commands import rehearse as rehearsing

        return rehearsing.rehearse(
            recipe, values, on, detach=detach, dry_run=dry_run, yes=yes, keep=keep,
            as_json=as_json,
        )  # fmt: skip
    if keep:
        raise UsageError("--keep goes with --rehearse", "a run's artifacts are kept anyway")
    if dry_run:
        return drive.dry_run(recipe, values, on, detach=detach, as_json=as_json)
    return drive.up(recipe, values, on, detach=detach, yes=yes, new=new, as_json=as_json)


@app.command()
def status(
    run: Annotated[
        Optional[str],
        typer.Argument(
            metavar="RUN",
            help="A run (name, id, or gs:// URI) in full; else a list.",
            autocompletion=run_names,
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again, until Ctrl-C.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="List every run.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="List at most so many runs.")] = 20,
    as_json: JsonOption = False,
) -> int:
    """Show the newest runs, or everything about one."""
    from launcher.commands import show

    return show.status(run, watch=watch, everything=everything, limit=limit, as_json=as_json)


@app.command()
def logs(
    run: RunArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run is over.")
    ] = False,
    worker: Annotated[
        Optional[int], typer.Option("--worker", min=0, help="Only the worker of this global rank.")
    ] = None,
    tail: Annotated[
        Optional[int], typer.Option("--tail", "-n", min=0, help="Only the last N lines.")
    ] = None,
    since: Annotated[
        Optional[str], typer.Option("--since", help="Only lines since: 10m, or an ISO time.")
    ] = None,
    timestamps: Annotated[
        bool, typer.Option("--timestamps", "-t", help="Start lines with their time (UTC).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document per line.")] = False,
) -> int:
    """Print what a run's workers have written."""
    from launcher.commands import show

    return show.logs(
        run, follow=follow, worker=worker, tail=tail, since=since, timestamps=timestamps,
        as_json=as_json,
    )  # fmt: skip


@app.command()
def stop(run: RunArgument, as_json: JsonOption = False) -> int:
    """Ask a run to save and end; wait until it has."""
    from launcher.commands import drive

    return drive.stop(run, as_json=as_json)


@app.command()
def resume(
    run: RunArgument,
    overrides: SetOption = None,
    detach: DetachOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> int:
    """Go on with a run from its last checkpoint.

    It may have been stopped, have failed, or have lost its driver.
    """
    from launcher.commands import drive

    return drive.resume(run, overrides or (), detach=detach, yes=yes, as_json=as_json)


@app.command()
def attach(
    run: RunArgument,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Drive it from here, even if another host does.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Follow a run again, as `up` does."""
    from launcher.commands import drive

    return drive.attach(run, take_over=take_over, as_json=as_json)


@app.command()
def teardown(
    run: Annotated[
        Optional[str],
        typer.Argument(
            metavar="RUN",
            help="The run (name, id, or gs:// URI), or --all.",
            autocompletion=run_names,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All your runs, and whatever else carries your label.")
    ] = False,
    timeout: Annotated[
        Optional[str],
        typer.Option(
            "--timeout",
            metavar="DURATION",
            help="Wait no longer for what does not go or answer: 5m. Default: 15m for each.",
        ),
    ] = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> int:
    """End a run now and delete what it holds.

    Exit code 0 only when all of it is confirmed gone, else 7.
    """
    from launcher.commands import drive

    return drive.teardown(run, everything=everything, timeout=timeout, yes=yes, as_json=as_json)


@app.command()
def sweep(
    everyone: Annotated[
        bool, typer.Option("--everyone", help="Also what carries other owners' labels.")
    ] = False,
    yes: YesOption = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document; delete only with --yes.")
    ] = False,
) -> int:
    """Find what carries our label and belongs to no live run; delete it.

    Exit code 0 when nothing is left, else 7.
    """
    from launcher.commands import sweep as commands

    return commands.sweep(everyone=everyone, yes=yes, as_json=as_json)


@app.command()
def pull(
    run: RunArgument,
    to: Annotated[
        Optional[str], typer.Option("--to", metavar="FOLDER", help="Default: ./RUN")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Copy a run's artifacts into a folder here."""
    from launcher.commands import show

    return show.pull(run, to=to, as_json=as_json)


@app.command()
def report(
    run: RunArgument,
    output: Annotated[
        Optional[str], typer.Option("--output", "-o", metavar="FILE", help="Where to write it.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Write a run's curves, comparison and facts into one HTML file."""
    from launcher.commands import show

    return show.report(run, output=output, as_json=as_json)


@app.command()
def tensorboard(
    run: RunArgument,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any.")] = 6006,
) -> int:
    """Open TensorBoard on a run's event files."""
    from launcher.commands import show

    return show.tensorboard(run, port=port)


@app.command()
def costs(
    since: Annotated[
        Optional[str], typer.Option("--since", help="Only what was spent since: 7d, 2026-11-01.")
    ] = None,
    by: Annotated[
        Optional[str],
        typer.Option("--by", help="Group: recipe, backend, accelerator, month, owner."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="List every run.")] = False,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a table in CSV.")] = False,
) -> int:
    """Show what all runs have cost, and what they cost now."""
    from launcher.commands import costs as commands

    return commands.show(since=since, by=by, everything=everything, as_json=as_json, as_csv=as_csv)


@app.command()
def drive(run: RunArgument) -> int:
    """Drive a run in the foreground; `up` does it for you."""
    from launcher.commands import drive as commands

    return commands.drive(run)


cli_recipes.add(app)
app.add_typer(cli_infra.app, name="infra")


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code; every failure is one clear message."""
    try:
        outcome = app(args=list(arguments) or ["--help"], prog_name="launch", standalone_mode=False)
        sys.stdout.flush()
        return int(outcome or 0)
    except LaunchError as error:
        return _fail(error, int(error.code), arguments)
    except (KeyboardInterrupt, typer.Abort):
        return int(Exit.INTERRUPTED)
    except (_ReaderGone, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.OK)
    except Exception as error:
        return _explain(error, arguments)


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def _explain(error: Exception, arguments: Sequence[str]) -> int:
    """A usage error of the parser, a refusal of the operating system, or a bug of ours."""
    if hasattr(error, "format_message"):
        return _usage(error, arguments)
    if os.environ.get("LAUNCH_DEBUG"):
        raise error
    if isinstance(error, OSError) and error.strerror:
        at = f"{error.filename}: " if error.filename else ""
        return _fail(LaunchError(f"{at}{error.strerror}"), int(Exit.ACCESS), arguments)
    first = (str(error).splitlines() or [""])[0]
    told = f"internal error: {type(error).__name__}: {first} (LAUNCH_DEBUG=1 shows the traceback)"
    return _fail(LaunchError(told), int(Exit.BUG), arguments)


def _usage(error: Any, arguments: Sequence[str]) -> int:
    """The parser's message in one line, with the nearest name, and where to read more."""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "launch"
    command = _command(arguments)
    if path == "launch" and command is not None:  # e.g. an option without its value
        path = f"launch {command.name}"
    told = UsageError(message, f"`{path} --help` lists what it takes")
    return _fail(told, int(Exit.USAGE), arguments)


def _fail(error: LaunchError, code: int, arguments: Sequence[str]) -> int:
    """The message on stderr; for a reader of JSON also a document on stdout."""
    from launcher import console

    command = _command(arguments)
    options = [option for p in command.params for option in p.opts] if command else []
    if "--json" in arguments and "--json" in options:
        console.failure(error, code)
    console.error(error)
    return code


def _command(arguments: Sequence[str]) -> Any:
    """The command that the arguments begin with (of a group, the one within it that they name),
    None when there is none of that name."""
    found: Any = typer.main.get_command(app)
    for word in (word for word in arguments if word[:1] != "-"):
        if not hasattr(found, "commands"):
            break
        found = found.commands.get(word)
    return found


def _meant(word: str) -> str:
    """What somebody who types `launch WORD` wants; "" when nothing comes to mind."""
    from launcher import shipped

    if word in _OTHER_WORDS:
        return _OTHER_WORDS[word]
    recipe = word.replace("_", "-") in shipped.names() or word.endswith((".yaml", ".yml"))
    return f"launch up {word}" if recipe else ""


if __name__ == "__main__":
    main()
