"""The engine: previews, updates and destroys the foundations, and gets over what was interrupted.

The only file that touches Pulumi's Automation API. What is declared is the caller's program; what
is shown of it, and asked of the user, is the caller's business too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional, TypeVar

from pulumi import automation
from pulumi.automation import errors as refusals
from semver import VersionInfo

from infra import deployments, passphrase, state_files
from infra.changes import Change, Collector, Step, exists_already, name_of, one_line
from infra.engine_cli import Cli
from infra.errors import EngineError, Failed, Locked, Passphrase, Stopped
from infra.interrupts import Interrupts
from infra.state_files import PROJECT, Holder

#: What the Automation API warns of when its engine was killed, which we tell ourselves: the end of
#: its stream of events, and what the program still had under way.
_NOISE: tuple[tuple[str, type[Warning]], ...] = (
    ("Error in event stream", UserWarning),
    (r"coroutine 'Output\..* was never awaited", RuntimeWarning),
)
_LOCK = re.compile(r"created by (\S+?)@(\S+) \(pid (\d+)\) at (\S+)")
_CODE = re.compile(r"^\s*code: -(\d+)")
#: Seconds that the readers of a process that has ended wait for the rest of its words: a plugin
#: that outlives it may keep its pipes open.
_LAST_WORDS = 5.0

#: What the Automation API raises over an answer or an event that is not the engine's.
_MISREAD = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError,
           AssertionError)  # fmt: skip

Program = Callable[[], None]
_Json = TypeVar("_Json", dict[str, Any], list[Any])


def name(project: str, bucket: str) -> str:
    """The stack of a project's bucket: at most 100 letters, digits, `-`, `_`, `.`; always the same,
    and of no other pair."""
    plain = f"{project}.{bucket}"
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", plain)
    if safe == plain and len(safe) <= 100:
        return safe
    return f"{safe[:91]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Status:
    """What the state says. `outputs`: what a program exported when one last ran to its end;
    `resources`: their names in the program; `pending`: operations whose outcome an interruption
    hid, or, while an update is `running`, those that it has in hand."""

    outputs: Mapping[str, Any]
    resources: tuple[str, ...]
    pending: tuple[str, ...]
    running: Optional[Holder] = None


class Stack:
    """The foundations of one bucket in one state. `home`: $LAUNCH_HOME/infra; `state`: a gs:// URL
    or None (a folder below `home`), where PULUMI_BACKEND_URL does not say. Nothing is done before
    a method is called; every method raises `EngineError` or one of its kinds."""

    def __init__(
        self,
        stack: str,
        cli: Cli,
        home: Path,
        environ: Mapping[str, str],
        *,
        state: Optional[str] = None,
        say: Callable[[str], None],
        tell: Callable[[Step], None] = lambda step: None,
    ) -> None:
        for message, kind in _NOISE:  # each time: who runs us may have set filters of its own
            warnings.filterwarnings("ignore", message=message, category=kind)
        self.name, self.home, self._environ = stack, home, environ
        self._say, self._tell = say, tell
        self.interrupts = Interrupts(say)
        self._selected: Optional[automation.Stack] = None
        self.state = state_files.url(home, environ, state)
        self._local = state_files.is_local(self.state)
        self._folder = home / "work" / stack
        for folder in (home / "state", self._folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._variables = {
            "PULUMI_BACKEND_URL": self.state,
            "PULUMI_HOME": str(home / "engine"),
            "PULUMI_SKIP_UPDATE_CHECK": "true",
            "GRPC_VERBOSITY": "NONE",
        }
        self._command = _Command(cli, environ, self.interrupts, self._folder / "engine.json")

    def preview(self, program: Optional[Program]) -> tuple[Change, ...]:
        """What `up` with `program` would do (without one: `destroy`), resource by resource. For a
        program it makes the state when there is none yet, and nothing else."""
        return self.interrupts.run(lambda: self._preview(program))

    def up(self, program: Program) -> tuple[Change, ...]:
        """Make it so: what `program` does not declare goes. Errors: `Failed`, with `existing` for
        what the cloud has already."""
        return self.interrupts.run(lambda: self._up(program))

    def destroy(self) -> tuple[Change, ...]:
        """Delete what the state names, then the state itself when nothing is left in it."""
        return self.interrupts.run(self._destroy)

    def drift(self) -> tuple[Change, ...]:
        """What is not any more as the state has it; changes nothing."""
        return self.interrupts.run(self._drift)

    def settle(self) -> tuple[str, ...]:
        """After an interruption: break the lock of a process of ours that has died, and ask the
        cloud about every operation in flight then. Returns those operations."""
        return self.interrupts.run(self._settle)

    def unlock(self) -> None:
        """Take away the lock, whoever holds it."""
        self.interrupts.run(lambda: self._unlocked(self._opened(create=False)))

    def status(self) -> Optional[Status]:
        """None: nothing was ever made."""
        return self.interrupts.run(self._status)

    def last_update(self) -> Optional[Mapping[str, Any]]:
        """Kind, result, start and end, as the engine prints them; None when there was none."""
        return self.interrupts.run(self._last_update)

    def _preview(self, program: Optional[Program]) -> tuple[Change, ...]:
        opened = self._opened(create=program is not None)
        if opened is None:
            return ()
        seen = Collector(self._tell_nobody)
        with self._explained("preview", seen):
            if program is None:
                opened.preview_destroy(color="never", on_event=seen.see)
            else:
                opened.preview(program=program, color="never", on_event=seen.see)
        return seen.changes

    def _up(self, program: Program) -> tuple[Change, ...]:
        opened = self._opened(create=True)
        assert opened is not None  # it was made if need be
        seen = Collector(self._tell)
        self._past_dead_lock(
            opened, "up", seen,
            lambda: opened.up(
                program=program, color="never", on_event=seen.see, show_secrets=False
            ),
        )  # fmt: skip
        return seen.changes

    def _destroy(self) -> tuple[Change, ...]:
        opened = self._opened(create=False)
        if opened is None:
            return ()
        seen = Collector(self._tell)
        self._past_dead_lock(
            opened, "destroy", seen,
            lambda: opened.destroy(color="never", on_event=seen.see, show_secrets=False),
        )  # fmt: skip
        with self._explained("destroy"):
            deployment = self._exported()
            if not deployments.resources(deployment) and not deployments.pending(deployment):
                opened.workspace.remove_stack(self.name)
                self._selected = None
        return seen.changes

    def _drift(self) -> tuple[Change, ...]:
        opened = self._opened(create=False)
        if opened is None:
            return ()
        seen = Collector(self._tell_nobody)
        with self._explained("refresh", seen):
            opened.preview_refresh(color="never", on_event=seen.see)
        return seen.changes

    def _settle(self) -> tuple[str, ...]:
        opened = self._opened(create=False)
        if opened is None:
            return ()
        with self._explained("export"):
            pending = deployments.pending(self._exported())
        if pending:
            # It reads what there is, and forgets what was being created: should the cloud have
            # that, the next update hears of it, and it is adopted.
            self._past_dead_lock(
                opened, "refresh", None,
                lambda: opened.refresh(
                    clear_pending_creates=True, color="never", show_secrets=False
                ),
            )  # fmt: skip
        return pending

    def _status(self) -> Optional[Status]:
        opened = self._opened(create=False)
        if opened is None:
            return None
        # Before what it writes is read. Of a state in a bucket only our own updates are known.
        running = state_files.running(self.state, self.name) or self._command.running()
        with self._explained("status"):
            deployment = self._exported()
            outputs = self._json(dict, "stack", "output", "--json")
        names = tuple(name_of(urn) for urn in deployments.resources(deployment))
        return Status(outputs, names, deployments.pending(deployment), running)

    def _last_update(self) -> Optional[Mapping[str, Any]]:
        if self._opened(create=False) is None:
            return None
        with self._explained("history"):
            words = ("stack", "history", "--json", "--page-size", "1", "--page", "1")
            newest = next(iter(self._json(list, *words)), None)
            if newest is not None and not isinstance(newest, dict):
                raise deployments.Strange(f"`stack history` answers {str(newest)[:100]!r}")
        facts = ("kind", "result", "startTime", "endTime")
        return {key: newest.get(key) for key in facts} if newest is not None else None

    def _opened(self, create: bool) -> Optional[automation.Stack]:
        """The stack, made when there is none and `create`; else None. Errors: `Passphrase`."""
        if self._selected is not None:
            return self._selected
        variables = dict(self._variables)
        workspace = automation.LocalWorkspace(
            work_dir=str(self._folder),
            pulumi_home=variables["PULUMI_HOME"],
            program=_not_run,
            env_vars=variables,
            secrets_provider="passphrase",
            project_settings=automation.ProjectSettings(name=PROJECT, runtime="python"),
            pulumi_command=self._command,
        )
        with self._explained("select"):
            try:
                opened = automation.Stack.select(self.name, workspace)
            except automation.StackNotFoundError:
                if not create:
                    return None
                if passphrase.ensure(self.home, self._environ, shared=not self._local):
                    self._say(
                        f"made a passphrase for the state: {passphrase.place(self.home)}; keep a "
                        "copy, without it the state cannot be read"
                    )
                variables.update(passphrase.variables(self.home, self._environ))
                opened = automation.Stack.create(self.name, workspace)
        variables.update(passphrase.variables(self.home, self._environ))
        self._variables, self._selected = variables, opened
        return opened

    def _past_dead_lock(
        self,
        opened: automation.Stack,
        doing: str,
        seen: Optional[Collector],
        work: Callable[[], object],
    ) -> None:
        """`work()`, and once again where the lock of a process of ours that died was in the way."""
        try:
            with self._explained(doing, seen):
                work()
        except Locked as lock:
            if not lock.stale:
                raise
            self._say(str(lock))
            self._unlocked(opened)
            with self._explained(doing, seen):
                work()

    def _unlocked(self, opened: Optional[automation.Stack]) -> None:
        if opened is not None:
            with self._explained("cancel"):
                opened.cancel()
            self._say("took away the lock")

    def _exported(self) -> Mapping[str, Any]:
        """The deployment as the state has it, secrets encrypted."""
        return deployments.checked(self._json(dict, "stack", "export").get("deployment"))

    def _json(self, kind: type[_Json], *words: str) -> _Json:
        """What a command of the engine prints, of this kind. Errors: `deployments.Strange`."""
        done = self._command.run([*words, "--stack", self.name], str(self._folder), self._variables)
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            answer = None
        if not isinstance(answer, kind):
            said = one_line(done.stdout)[:100] or "nothing"
            raise deployments.Strange(f"`{' '.join(words[:2])}` answers '{said}'")
        return answer

    @contextmanager
    def _explained(self, doing: str, seen: Optional[Collector] = None) -> Iterator[None]:
        """Turn the engine's refusals into errors of one line."""
        try:
            yield
        except refusals.ConcurrentUpdateError as error:
            raise self._locked(str(error).partition("stderr: ")[2]) from error
        except refusals.CommandError as error:
            raise self._refused(doing, str(error), seen) from error
        except refusals.InvalidVersionError as error:
            raise EngineError(one_line(str(error)), "put a newer pulumi on PATH") from error
        except OSError as error:
            raise EngineError(f"pulumi {doing}: {error.strerror or error}") from error
        except deployments.Strange as error:
            raise self._unread(doing, str(error)) from error
        except _MISREAD as error:
            why = one_line(f"{type(error).__name__}: {error}")
            raise self._unread(doing, f"what it wrote cannot be read ({why})") from error

    def _unread(self, doing: str, why: str) -> EngineError:
        """Nobody knows what the engine did; of a destroy, what is left."""
        what, engine = f"pulumi {doing}: {why}", self._command
        if doing == "destroy":
            return Failed(what)
        return EngineError(
            what,
            f"see whether {engine.command} is pulumi {engine.version} itself, and whether the "
            f"state in {self.state} is whole",
        )

    def _refused(self, doing: str, answer: str, seen: Optional[Collector]) -> EngineError:
        stderr = answer.partition("stderr: ")[2]
        if "incorrect passphrase" in stderr:
            return Passphrase(
                f"the passphrase is not the one that the state of {self.name} was made with",
                f"set {passphrase.WORD} or {passphrase.FILE} to that one, or copy "
                f"{passphrase.place(self.home)} from the machine that made the state",
            )
        failures = seen.failures() if seen is not None else []
        if failures:
            told = [f"{who}: {why}" if who else why for who, why in failures]
            existing = [who for who, why in failures if who and exists_already(why)]
            return Failed("\n".join(told), existing)
        lines = [line for line in stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.lstrip().startswith("error:")] or lines[-1:]
        if errors:
            return Failed(f"pulumi {doing}: {one_line(errors[0]).removeprefix('error: ')}")
        code = _CODE.search(answer)
        signal = f" by signal {code[1]}" if code else ""
        return Failed(f"pulumi {doing} was ended{signal} before it had written down what it did")

    def _locked(self, stderr: str) -> Locked:
        found = _LOCK.search(stderr)
        if found is None:
            return Locked(f"the state of {self.name} is locked: {one_line(stderr)}", False)
        user, host, pid, since = found.groups()
        dead = Holder(user, host, int(pid), since).dead
        # A host of the same name may share a bucket with this one: there, only what we started.
        ours = self._local or self._command.last_pid() == int(pid)
        died = ", which has died" if dead else ""
        text = f"{user}@{host} (process {pid}{died}) holds the state of {self.name} since {since}"
        return Locked(text, dead and ours)

    @staticmethod
    def _tell_nobody(step: Step) -> None:
        """A preview's steps are none."""


class _Command(automation.PulumiCommand):
    """Runs the command line in a session of its own, where interrupts reach it through us."""

    def __init__(
        self, cli: Cli, environ: Mapping[str, str], interrupts: Interrupts, note: Path
    ) -> None:
        self.command, self.version = str(cli.path), VersionInfo.parse(cli.version)
        self._environ, self._interrupts, self._note = environ, interrupts, note

    def run(
        self,
        args: list[str],
        cwd: str,
        additional_env: Mapping[str, str],
        on_output: Optional[Callable[[str], Any]] = None,
        on_error: Optional[Callable[[str], Any]] = None,
    ) -> automation.CommandResult:
        """As the class it stands for. Errors: `automation.CommandError`, `Stopped`."""
        self._interrupts.refuse()
        environ = {**self._environ, **additional_env, "PULUMI_AUTOMATION_API": "true"}
        beside = str(Path(self.command).parent)
        environ["PATH"] = os.pathsep.join(filter(None, (beside, environ.get("PATH"))))
        process = subprocess.Popen(
            [self.command, "--non-interactive", *args],
            cwd=cwd, env=environ, encoding="utf-8", errors="replace", start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        if args[:1] in (["up"], ["destroy"], ["refresh"]):
            self._noted(process.pid, ended=False)
        readers = [_Reader(process.stdout, on_output), _Reader(process.stderr, on_error)]
        with self._interrupts.watching(process):
            process.wait()
        if self.last_pid() == process.pid:
            self._noted(process.pid, ended=True)
        for reader in readers:
            reader.join(_LAST_WORDS)
        stdout, stderr = (reader.text() for reader in readers)
        result = automation.CommandResult(stdout, stderr, process.returncode)
        if process.returncode != 0:
            raise refusals.create_command_error(result)
        return result

    def last_pid(self) -> Optional[int]:
        """The process that last worked on this state from here."""
        note = self._last()
        return None if note is None else note[0].pid

    def running(self) -> Optional[Holder]:
        """The update from here that has not ended."""
        note = self._last()
        return None if note is None or note[1] or note[0].dead else note[0]

    def _noted(self, pid: int, ended: bool) -> None:
        since = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._note.write_text(json.dumps({"pid": pid, "since": since, "ended": ended}))

    def _last(self) -> Optional[tuple[Holder, bool]]:
        try:
            note = json.loads(self._note.read_text())
            since, ended = str(note.get("since", "")), bool(note.get("ended", True))
            return Holder("", socket.gethostname(), int(note["pid"]), since), ended
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


class _Reader(threading.Thread):
    """Gathers the lines of a pipe."""

    def __init__(self, pipe: Any, callback: Optional[Callable[[str], Any]]) -> None:
        super().__init__(daemon=True)
        self._pipe, self._callback = pipe, callback
        self._lines: list[str] = []
        self.start()

    def run(self) -> None:
        for line in self._pipe:
            self._lines.append(line.rstrip())
            if self._callback is not None:
                self._callback(self._lines[-1])

    def text(self) -> str:
        return "\n".join(self._lines)


def _not_run() -> None:
    """That there is one tells the engine that programs are in this process; a refresh and a destroy
    run none, and the others are given theirs."""
    raise AssertionError("this is no program")


__all__ = ["PROJECT", "EngineError", "Stack", "Status", "Stopped", "name"]
