"""The table of stages, and the few lines that put one together: the one place where stages meet."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

from trainer import models, probe, sinks
from trainer import smoke as smoke_test
from trainer.banner import banner, run_meta
from trainer.checkpoint import Checkpoints, load_state, resolve
from trainer.config import ConfigError, Job, StageConfig, missing_blocks, to_dict
from trainer.data import read
from trainer.data.stream import Rows, Stream, build_rows
from trainer.data.tokenizer import train_tokenizer
from trainer.evaluate import cross_entropy
from trainer.loop import Horizon, Loop, Outcome
from trainer.metrics import Metrics, plain
from trainer.objective import Objective
from trainer.objectives.distill import DistillOnline
from trainer.objectives.next_token import NextToken
from trainer.runtime import Runtime
from trainer.store import atomic_write
from trainer.throughput import Meter


@dataclass(frozen=True)
class Context:
    """What every stage gets. `metrics` is None on ranks that do not write."""

    config: StageConfig
    job: Job
    runtime: Runtime
    metrics: Optional[Metrics]
    say: Callable[[str], None]
    signalled: Callable[[], bool]

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    def stop_asked(self) -> bool:
        return stop_asked(self.job)


def stop_asked(job: Job) -> bool:
    """Whether the marker asks the job to end."""
    return job.control is not None and (Path(job.control) / "stop.json").exists()


ObjectiveFactory = Callable[[Context, Any], Objective]


def run_stage(
    config: StageConfig,
    job: Job,
    runtime: Runtime,
    say: Callable[[str], None],
    signalled: Callable[[], bool],
) -> Outcome:
    """Run one stage to its end and record it. `signalled`: whether this process was asked to
    leave. Errors: those of its parts, one clear line each."""
    missing = missing_blocks(config.stage, {k for k, v in vars(config).items() if v is not None})
    if missing:
        raise ConfigError(f"stage {config.id}: missing {', '.join(missing)}")
    folder = Path(config.output)
    if runtime.main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "args_snapshot.json", to_dict(config))
    runtime.barrier()
    runtime = runtime.at(config.model.precision if config.model else "auto")
    metrics = _metrics(config, job, say) if runtime.main else None
    started = time.time()
    try:
        voice = say if runtime.main else _quiet
        context = Context(config, job, runtime, metrics, voice, signalled)
        _record(context, started, None)
        outcome = STAGES[config.stage](context)
        _record(context, started, outcome)
        runtime.barrier()  # a rank that leaves first would have torchrun end the others
        return outcome
    finally:
        if metrics is not None:
            metrics.close()


def _metrics(config: StageConfig, job: Job, say: Callable[[str], None]) -> Metrics:
    chosen = config.train.report_to if config.train else ("tensorboard",)
    about = sinks.About(job.run, config.id, job.attempt, Path(config.output), to_dict(config))
    trackers = {} if job.dry_run else sinks.start(chosen, about)
    board = "tensorboard" in chosen
    return Metrics(
        config.output, config.id, job.attempt, tensorboard=board, trackers=trackers, warn=say
    )


def tokenizer(context: Context) -> Outcome:
    """Train a byte-level BPE tokenizer on `data.train`."""
    config, started = context.config, time.perf_counter()
    assert config.tokenizer is not None
    documents = list(read.documents(config.data.train))
    if context.runtime.main:
        context.say(f"tokenizer: {len(documents)} documents")
        train_tokenizer(
            [document.text for document in documents],
            config.tokenizer.vocab_size,
            config.tokenizer.min_frequency,
            context.folder / "tokenizer",
        )
    context.runtime.barrier()
    size = len(models.load_tokenizer(str(context.folder / "tokenizer")))
    context.say(f"tokenizer: {size} tokens in {context.folder / 'tokenizer'}")
    return Outcome(None, 0, time.perf_counter() - started, {"vocab_size": float(size)})


def train(make_objective: ObjectiveFactory) -> Callable[[Context], Outcome]:
    """A stage that trains a model with the objective that `make_objective` gives."""

    def run(context: Context) -> Outcome:
        config, runtime = context.config, context.runtime
        assert config.model is not None and config.train is not None
        plan, settings = config.model, config.train
        reference = plan.tokenizer or plan.name
        if reference is None:
            raise ConfigError(f"stage {config.id}: model: give `name`, or `architecture`")
        tokens = models.load_tokenizer(reference)
        rows = _rows(context, tokens)
        held_out = _held_out(context, tokens)
        micro_batch, accumulate = probe.first_cut(settings, runtime.world_size)
        stream = Stream(
            rows,
            micro_batch=micro_batch,
            accumulate=accumulate,
            rank=runtime.rank,
            world_size=runtime.world_size,
            seed=settings.seed,
        )
        checkpoints, newest = _checkpoints(context)
        if newest is not None:
            plan = replace(plan, name=str(newest), init="pretrained", architecture=None)
        model = models.load_model(plan, tokens, runtime, settings.seed)
        objective = make_objective(context, tokens)
        horizon = _horizon(context, stream)
        for line in banner(config, runtime, model, tokens, rows, held_out, horizon):
            context.say(line)

        def write_model(folder: Path) -> None:
            model.save_pretrained(folder)
            tokens.save_pretrained(folder)

        loop = Loop(
            settings,
            folder=context.folder,
            horizon=horizon,
            model=model,
            objective=objective,
            stream=stream,
            validation=held_out,
            runtime=runtime,
            metrics=context.metrics,
            checkpoints=checkpoints,
            resume_from=newest,
            write_model=write_model,
            signalled=context.signalled,
            stop_asked=context.stop_asked,
            say=context.say,
            measure=Meter(model, rows, runtime, context.job.peak_tflops).facts,
        )
        if settings.micro_batch == "auto" and newest is None:  # a checkpoint knows what fitted
            largest = probe.largest_micro_batch(
                model, objective, rows, runtime, limit=stream.micro_batch, say=context.say
            )
            loop.limit_micro_batch(largest)
        outcome = loop.run()
        outcome.evaluation["parameters"] = float(models.parameter_count(model))
        return outcome

    return run


def evaluate(context: Context) -> Outcome:
    """Compare models on `data.validation`; each is read with its own tokenizer."""
    config, started = context.config, time.perf_counter()
    assert config.evaluate is not None
    table: list[dict[str, Any]] = []
    results: dict[str, float] = {}
    for label, reference in config.evaluate.models.items():
        if context.runtime.any(context.signalled())[0]:
            stopped = "stop" if context.stop_asked() else "signal"
            return Outcome(stopped, 0, time.perf_counter() - started)
        tokens = models.load_tokenizer(reference)
        rows = build_rows(
            config.data.validation,
            tokens,
            sequence_length=config.data.sequence_length,
            packing=config.data.packing,
        )
        attention = models.attention_implementation(config.model, context.runtime)
        model = models.load_frozen(reference, context.runtime, attention)
        loss, count = cross_entropy(model, rows, context.runtime, micro_batch=8)
        size = models.parameter_count(model)
        row = {"model": label, "parameters": size, "val_loss": loss, "val_tokens": count}
        row.update(_history(reference))
        table.append(row)
        results[f"{label}.val_loss"] = loss
        context.say(f"{label}: val_loss {loss:.4f} over {count} tokens, {size:,} parameters")
    if context.metrics is not None:
        context.metrics.table(table)
    return Outcome(None, 0, time.perf_counter() - started, results)


def smoke(context: Context) -> Outcome:
    """Device, all-reduce and training on synthetic data. Errors: `SmokeFailed`."""
    config = context.config.smoke
    assert config is not None
    report = smoke_test.run(config, context.runtime, context.say)
    if context.metrics is not None:
        context.metrics.step(
            report.steps, train_loss=report.last, all_reduce_GB_per_sec=report.bandwidth
        )
    facts = {"first_loss": report.first, "last_loss": report.last}
    if report.bandwidth is not None:
        facts["all_reduce_GB_per_sec"] = report.bandwidth
    return Outcome(None, report.steps, report.seconds, facts)


def write_json(path: Path, value: Any) -> None:
    """Atomically; numbers that are not finite become strings, which no gate takes for numbers."""
    text = json.dumps(plain(value), indent=1, sort_keys=True, allow_nan=False)
    atomic_write(path, (text + "\n").encode())


def _next_token(context: Context, tokens: Any) -> Objective:
    return NextToken()


def _distill(context: Context, tokens: Any) -> Objective:
    kd = context.config.kd
    assert kd is not None
    if models.has_tokenizer(kd.teacher):
        models.check_vocabularies(tokens, models.load_tokenizer(kd.teacher))
    attention = models.attention_implementation(context.config.model, context.runtime)
    teacher = models.load_frozen(kd.teacher, context.runtime, attention)
    context.say(
        f"teacher: {kd.teacher}, {models.parameter_count(teacher):,} parameters,"
        f" vocabulary {teacher.config.vocab_size}"
    )
    return DistillOnline(kd, teacher, context.runtime)


#: stage -> how it runs. Another objective is one more row.
STAGES: dict[str, Callable[[Context], Outcome]] = {
    "tokenizer": tokenizer,
    "pretrain": train(_next_token),
    "kd": train(_distill),
    "evaluate": evaluate,
    "smoke": smoke,
}


def _rows(context: Context, tokens: Any) -> Rows:
    config = context.config
    assert config.train is not None
    limit = None
    if config.train.limit_batches is not None:
        world_size = context.runtime.world_size
        micro_batch, _ = probe.first_cut(config.train, world_size)
        limit = config.train.limit_batches * micro_batch * world_size
    return build_rows(
        config.data.train,
        tokens,
        sequence_length=config.data.sequence_length,
        packing=config.data.packing,
        limit_rows=limit,
    )


def _held_out(context: Context, tokens: Any) -> Optional[Rows]:
    data = context.config.data
    if not data.validation:
        return None
    return build_rows(
        data.validation,
        tokens,
        sequence_length=data.sequence_length,
        packing=data.packing,
    )


def _checkpoints(context: Context) -> tuple[Optional[Checkpoints], Optional[Path]]:
    """The stage's checkpoints, and the newest whole one: rank 0 looks and verifies, for all."""
    settings, runtime = context.config.train, context.runtime
    assert settings is not None
    checkpoints = None
    if runtime.main:
        folder = context.folder / "checkpoints"
        checkpoints = Checkpoints(folder, settings.keep, warn=context.say)
    newest = runtime.gather(str(checkpoints.newest() or "") if checkpoints else "")[0]
    return checkpoints, Path(newest) if newest else None


def _horizon(context: Context, stream: Stream) -> Horizon:
    settings = context.config.train
    assert settings is not None
    if settings.seconds_of is not None:
        return Horizon(seconds=_training_seconds(settings.seconds_of))
    if settings.epochs is not None:
        return Horizon(steps=stream.steps_for_epochs(settings.epochs))
    return Horizon(steps=settings.steps)


def _training_seconds(reference: str) -> float:
    path = Path(reference) / "run_meta.json"
    try:
        meta = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"train.seconds_of: cannot read {path}: {error}") from error
    if not meta.get("completed"):
        raise ConfigError(f"train.seconds_of: the stage in {reference} is not completed")
    return float(meta["training_seconds"])


def _history(reference: str) -> dict[str, Any]:
    """Steps and training time that made a model, when it is a checkpoint of ours."""
    resolved = Path(resolve(reference))
    if not (resolved / "MANIFEST.json").exists():
        return {}
    state = load_state(resolved)
    return {"step": state["step"], "training_seconds": round(state["training_seconds"], 3)}


def _record(context: Context, started: float, outcome: Optional[Outcome]) -> None:
    """run_meta.json and evaluation.json: the latter only when there is something to say."""
    if not context.runtime.main:
        return
    folder = context.folder
    if outcome is not None and outcome.evaluation:
        write_json(folder / "evaluation.json", outcome.evaluation)
    meta = run_meta(context.config, context.job, context.runtime, os.environ)
    meta["started"] = started
    if outcome is not None:
        meta.update(
            ended=time.time(),
            completed=outcome.stopped is None,
            stopped=outcome.stopped,
            global_step=outcome.step,
            training_seconds=outcome.training_seconds,
            parameters=outcome.evaluation.get("parameters"),
        )
    write_json(folder / "run_meta.json", meta)


def _quiet(line: str) -> None:
    del line
