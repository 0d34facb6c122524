"""The user's rewards: found by name, called as TRL calls its reward functions, and checked."""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

from trainer.config import ConfigError, StageConfig

#: What every function may ask for, besides the columns of the data.
GIVEN = ("prompts", "completions", "completion_ids")


class Reward:
    """One function. `label`: its own name, for metrics; `name`: as the recipe has it."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function
        self.label = name.rpartition(":")[2]
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.takes = [p.name for p in named]
        self.needs = [p.name for p in named if p.default is p.empty]

    def check(self, columns: Sequence[str]) -> None:
        """Errors: `ConfigError` when the function needs what no record has."""
        for wanted in self.needs:
            if wanted not in (*GIVEN, *columns):
                there = ", ".join(columns) or "none"
                raise ConfigError(
                    f"grpo.rewards: {self.name} asks for `{wanted}`, which no record holds; columns"
                    f" of the data: {there}"
                )

    def __call__(self, **lists: Sequence[Any]) -> list[Optional[float]]:
        """The reward of each answer; None: the function leaves it out. `lists`: `GIVEN` and the
        columns, as long as there are answers. Errors: `ConfigError` naming the function."""
        wanted = lists if self.takes_all else {k: v for k, v in lists.items() if k in self.takes}
        try:
            # Copies: the answers are still to be learned from, the columns are the data's, and the
            # next function is to see neither changed.
            found = self.function(**copy.deepcopy(wanted))
        except (Exception, SystemExit) as error:  # no function ends the run
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise ConfigError(
                f"grpo.rewards: {self.name} failed: {_in_a_line(error)}"
                f" ({place.filename}:{place.lineno})"
            ) from error
        count = len(lists["completions"])
        no_list = not hasattr(found, "__len__") or getattr(found, "ndim", 1) == 0  # of a tensor
        if no_list or isinstance(found, (str, dict, set)):
            raise ConfigError(
                f"grpo.rewards: {self.name} gave {type(found).__name__}; it must give a list of"
                " numbers, one for each answer"
            )
        if len(found) != count:
            raise ConfigError(
                f"grpo.rewards: {self.name} gave {len(found)} rewards for {count} answers"
            )
        return [self._number(value) for value in found]

    def _number(self, value: Any) -> Optional[float]:
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(value, str) or not math.isfinite(number):
            raise ConfigError(
                f"grpo.rewards: {self.name} gave {value!r}; a reward is a finite number, or None"
                " where the function leaves an answer out"
            )
        return number


def check(stages: Iterable[StageConfig]) -> None:
    """Errors: `ConfigError` when a stage names a reward that cannot be loaded: before the stages
    ahead of it have cost anything."""
    for stage in stages:
        if stage.grpo is not None:
            load(stage.grpo.rewards)


def load(names: Sequence[str]) -> list[Reward]:
    """The functions called `module:function` or `path/file.py:function`; both are looked for in the
    working folder, too, and then on PYTHONPATH. Errors: `ConfigError`."""
    rewards = [_load(name) for name in names]
    labels = [reward.label for reward in rewards]
    for reward in rewards:
        if labels.count(reward.label) > 1:  # metrics must not be mixed up
            reward.label = reward.name.replace(":", ".").replace("/", ".")
    return rewards


def _load(name: str) -> Reward:
    where, _, wanted = name.rpartition(":")
    try:
        with _working_folder():
            module = _file(where) if where.endswith(".py") else importlib.import_module(where)
    except (Exception, SystemExit) as error:  # a script that ends itself is no module
        raise ConfigError(
            f"grpo.rewards: cannot import {name}: {_in_a_line(error)}{_where(error)}"
        ) from error
    function = getattr(module, wanted, None)
    if function is None:
        raise ConfigError(f"grpo.rewards: {where} has no `{wanted}`")
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise ConfigError(f"grpo.rewards: {name} is no plain function")
    try:
        return Reward(name, function)
    except (TypeError, ValueError) as error:  # of some that are written in C
        raise ConfigError(f"grpo.rewards: {name} does not say what it takes: {error}") from error


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _where(error: BaseException) -> str:
    """What helps: where was looked, or which line of the user's file is at fault."""
    if isinstance(error, ImportError):
        return "; send files of your own with `code:`, install others where the job runs"
    if isinstance(error, SyntaxError):  # names its file and line itself
        return ""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({place.filename}:{place.lineno})"


def _file(path: str) -> ModuleType:
    places = [folder / path for folder in map(Path, ("", *sys.path))]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise ModuleNotFoundError(f"no such file in {Path.cwd()} or on PYTHONPATH")
    # A name that hides no module, and the same for all functions of a file: it runs once.
    digest = hashlib.sha256(str(place.resolve()).encode()).hexdigest()
    name = f"{place.stem}_{digest[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, place)
    if found is None or found.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _working_folder() -> Iterator[None]:
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)
