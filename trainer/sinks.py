"""Trackers beside the metrics lines: MLflow and Weights & Biases, imported on use.

They are conveniences. A tracker works in a thread of its own, so that one that is slow, absent or
out of reach costs a warning and nothing else; what it cannot take is in the metrics lines anyway.
"""

from __future__ import annotations

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional, Protocol

from trainer.secret_words import NAMES, hide, words

Numbers = Mapping[str, float]
_WAITING = 1000  # steps that a tracker may be behind
_PATIENCE = 60.0  # seconds it has to finish when training is over
#: `user:password@` of a URL; before a host of the web a user alone may be a token.
_USER = re.compile(r"(?<=://)[^/\s:@]*:[^/\s]*@|(?<=http://)[^/\s]+@|(?<=https://)[^/\s]+@")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|KEY$", re.IGNORECASE)


@dataclass(frozen=True)
class About:
    """The run as trackers show it: `title` is its name for people. `parameters` is the stage's
    configuration; `folder` the stage's, for what is kept on this disk."""

    run: str
    stage: str
    attempt: int
    folder: Path
    parameters: Mapping[str, Any]
    title: Optional[str] = None

    @property
    def name(self) -> str:
        return f"{self.title or self.run}-{self.stage}"

    @property
    def id(self) -> str:
        """Of this stage of this run alone; a name may come again."""
        return f"{self.run}-{self.stage}"


class Tracker(Protocol):
    """One service. The constructor begins a run; every method may raise anything."""

    def add(self, step: int, values: Numbers) -> None: ...
    def close(self) -> None: ...


class Background:
    """A tracker in its own thread: nothing here waits for it, but `close`, and that not for long.
    After a failure `add` and `close` raise it."""

    def __init__(self, begin: Callable[[], Tracker], patience: float = _PATIENCE) -> None:
        self._queue: queue.Queue[Optional[tuple[int, Numbers]]] = queue.Queue(_WAITING)
        self._failure: Optional[Exception] = None
        self._patience = patience
        # A daemon: a tracker that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, args=(begin,), daemon=True)
        self._thread.start()

    def add(self, step: int, values: Numbers) -> None:
        """Errors: what the tracker raised before; `TimeoutError` when it is far behind."""
        self._raise()
        try:
            self._queue.put_nowait((step, values))
        except queue.Full:
            raise TimeoutError(f"it is {_WAITING} steps behind") from None

    def close(self) -> None:
        """Let it finish. Errors: as those of `add`."""
        until = time.monotonic() + self._patience
        try:
            self._queue.put(None, timeout=self._patience)
        except queue.Full:
            raise TimeoutError(f"not finished after {self._patience:g} s") from None
        self._thread.join(max(0.0, until - time.monotonic()))
        self._raise()
        if self._thread.is_alive():
            raise TimeoutError(f"not finished after {self._patience:g} s")

    def _work(self, begin: Callable[[], Tracker]) -> None:
        try:
            tracker = begin()
            while (item := self._queue.get()) is not None:
                tracker.add(*item)
            tracker.close()
        except BaseException as error:  # also SystemExit: some clients end the process
            self._failure = error if isinstance(error, Exception) else RuntimeError(repr(error))
            while self._queue.get() is not None:
                pass  # until `close`, so that nobody waits for room

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure


class MLflow:
    """A run of the experiment $MLFLOW_EXPERIMENT_NAME (default `launch`) at $MLFLOW_TRACKING_URI
    (default: `store_folder`)."""

    def __init__(self, about: About) -> None:
        # Its own defaults wait for minutes on a server that does not answer.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        given = os.environ.get("MLFLOW_TRACKING_URI")
        if (given or "file:").startswith("file:"):
            # MLflow 3 refuses its file store unless told that it is wanted.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient(given or store_folder(about.folder).as_uri())
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "launch")
        found = self._client.get_experiment_by_name(name)
        place = found.experiment_id if found else self._client.create_experiment(name)
        tags = {"run": about.run, "stage": about.stage, "attempt": str(about.attempt)}
        self._run = self._client.create_run(place, run_name=about.name, tags=tags).info.run_id
        params = [Param(key, str(v)[:500]) for key, v in flat(about.parameters).items()]
        for start in range(0, len(params), 100):  # the most that one call takes
            self._client.log_batch(self._run, params=params[start : start + 100])

    def add(self, step: int, values: Numbers) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def store_folder(folder: Path) -> Path:
    """Where MLflow's files of a stage are kept: `mlruns` of its folder. MLflow refuses a store
    below a folder named `artifacts`: there it is `mlruns` beside the first one so named."""
    whole = folder.resolve()
    if "artifacts" in whole.parts:
        whole = Path(*whole.parts[: whole.parts.index("artifacts")])
    return whole / "mlruns"


class WandB:
    """A run of the project $WANDB_PROJECT (default `launch`); WANDB_MODE=offline keeps it in the
    stage folder's `wandb`. Attempts of one stage go on in one run. Neither the console nor code,
    git or the machine's facts are sent."""

    def __init__(self, about: About) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            silent=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_service_wait=90.0,  # a busy machine takes its time to start wandb's own process
        )
        online = os.environ.get("WANDB_MODE", "online") == "online"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "launch"),
            id=about.id if online else None,
            name=about.name,
            resume="allow" if online else None,  # offline there is nothing to go on from
            dir=str(about.folder),
            config=dict(flat(about.parameters)),
            settings=settings,
        )

    def add(self, step: int, values: Numbers) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


#: name in `train.report_to` -> tracker
TRACKERS: dict[str, Callable[[About], Tracker]] = {"mlflow": MLflow, "wandb": WandB}


def start(names: tuple[str, ...], about: About) -> dict[str, Background]:
    """The trackers among `names`, at work; parameters go to them without secrets."""
    clean = replace(about, parameters=without_secrets(about.parameters, os.environ))
    kinds = {name: TRACKERS[name] for name in names if name in TRACKERS}
    return {name: Background(partial(_begin, kind, clean)) for name, kind in kinds.items()}


def _begin(kind: Callable[[About], Tracker], about: About) -> Tracker:
    try:
        return kind(about)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; pip install 'launch-llm[tracking]'") from error


def without_secrets(value: Any, environ: Mapping[str, str]) -> Any:
    """`value` with `***` for what stands in a variable that the recipe calls a secret, or whose
    name says so (at least 8 characters there), and for user and password in a URL."""
    named = environ.get(NAMES, "").split()
    long = (name for name, v in environ.items() if _SECRET_NAME.search(name) and len(v) >= 8)
    secrets = words(environ, {*named, *long} - {NAMES})

    def clean(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: clean(child) for key, child in item.items()}
        if isinstance(item, (list, tuple)):
            return [clean(child) for child in item]
        if not isinstance(item, str):
            return item
        return _USER.sub("***@", hide(item, secrets))

    return clean(value)


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Nested mappings and lists as `train.lr`, `data.train.0.path`; None is left out."""
    if isinstance(value, Mapping):
        pairs = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, (list, tuple)):
        pairs = [(str(i), child) for i, child in enumerate(value)]
    else:
        return {} if value is None else {at: value}
    found: dict[str, Any] = {}
    for key, child in pairs:
        found.update(flat(child, f"{at}.{key}" if at else key))
    return found
