"""The table of stages, and the few lines that put one together: the one place where stages meet."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch

from trainer import (
    alarm,
    blocks,
    copies,
    float8,
    models,
    parallel,
    phases,
    probe,
    resume,
    sinks,
    trial,
)
from trainer.banner import banner, run_meta
from trainer.checkpoint import load_state, resolve
from trainer.config import ConfigError, Job, Source, StageConfig, missing_blocks, to_dict
from trainer.config_train import refused
from trainer.context import Context
from trainer.data import chat, read
from trainer.data.curriculum import Curriculum
from trainer.data.shapes import Skipped
from trainer.data.stream import Rows, Stream, build_rows
from trainer.data.tokenizer import train_tokenizer
from trainer.evaluate import Left, score
from trainer.freeze import frozen_mask
from trainer.loop import Loop, Outcome
from trainer.makers import distill, grpo, next_token, preference, sdce
from trainer.metrics import Metrics, plain
from trainer.model_files import ModelFiles
from trainer.objective import Objective
from trainer.runtime import Runtime
from trainer.schedule import Horizon
from trainer.single import export, merge, smoke
from trainer.store import atomic_write
from trainer.teacher_pass import write_targets
from trainer.throughput import Meter

ObjectiveFactory = Callable[[Context, Any], Objective]
#: The rows of sources, of at most so many rows, for a tokenizer.
Layout = Callable[[Context, Any, tuple[Source, ...], Optional[int]], Rows]
#: What must be there before data is read and a device is used; it becomes `Context.ready`.
Before = Callable[[Context, Any], Any]


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
        arguments = sinks.without_secrets(copies.named(to_dict(config)), os.environ)
        write_json(folder / "args_snapshot.json", arguments)
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
    arguments = to_dict(config)
    about = sinks.About(
        job.run, config.id, job.attempt, Path(config.output), arguments, title=job.name
    )
    trackers = {} if job.dry_run else sinks.start(chosen, about)
    board = "tensorboard" in chosen
    return Metrics(
        config.output, config.id, job.attempt, restart=job.restart, tensorboard=board,
        trackers=trackers, warn=say,
    )  # fmt: skip


def tokenizer(context: Context) -> Outcome:
    """Train a byte-level BPE tokenizer on `data.train`."""
    config, started = context.config, time.perf_counter()
    assert config.tokenizer is not None
    skipped = Skipped() if config.data.skip_bad else None
    view = chat.view_of(config.data, config.stage, None)
    documents = list(read.documents(config.data.train, view, skipped))
    if context.runtime.main:
        context.say(f"tokenizer: {len(documents)} documents")
        if skipped is not None and skipped.count:
            lines = f"{skipped.count} bad line{'' if skipped.count == 1 else 's'}"
            context.say(f"tokenizer: {lines} skipped: {skipped.examples[0]}")
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


def train(
    make_objective: ObjectiveFactory,
    lay_out: Layout = next_token.lay_out,
    before: Optional[Before] = None,
) -> Callable[[Context], Outcome]:
    """A stage that trains a model with the objective that `make_objective` gives, on the rows that
    `lay_out` makes of sources. `before` is asked first."""

    def run(context: Context) -> Outcome:
        config, runtime = context.config, context.runtime
        started = time.perf_counter()
        assert config.model is not None and config.train is not None
        plan, settings = config.model, config.train
        reference = plan.tokenizer or plan.name
        if reference is None:
            raise ConfigError(f"stage {config.id}: model: give `name`, or `architecture`")
        tokens = models.load_tokenizer(reference)
        if before is not None:
            context = replace(context, ready=before(context, tokens))
        micro_batch, accumulate = probe.first_cut(settings, runtime.world_size)
        limit, held_out = None, None
        if settings.limit_batches is not None:
            limit = settings.limit_batches * micro_batch * runtime.world_size
        rows = lay_out(context, tokens, config.data.train, limit)
        if config.data.validation:
            held_out = lay_out(context, tokens, config.data.validation, None)
        stream = Stream(
            rows,
            micro_batch=micro_batch,
            accumulate=accumulate,
            rank=runtime.rank,
            world_size=runtime.world_size,
            seed=settings.seed,
        )
        horizon = _horizon(context, stream)
        if config.data.curriculum:
            stream = _curriculum(context, rows, micro_batch, accumulate)
        checkpoints, newest = resume.begin(context.folder, config, tokens, runtime, context.say)
        if newest is not None and plan.adapter is None:
            plan = replace(plan, name=str(newest), init="pretrained", architecture=None)
        model = models.load_model(
            plan, tokens, runtime, settings.seed,
            adapter_from=newest, share=_share(config), say=context.say,
            before_placing=lambda model: _quicken(context, model),
        )  # fmt: skip
        name = (config.model.name if config.model.architecture is None else None) or "the model"
        trial.check(model, runtime, name, packing=config.data.packing)
        found = replace(context, rows=rows, held_out=held_out, model=model, fresh=newest is None)
        try:
            with alarm.listening(model, runtime, context.folder):  # it may read with the model
                objective = make_objective(found, tokens)
        except Left:
            return _left(context, newest, time.perf_counter() - started)
        for line in banner(config, runtime, model, tokens, rows, held_out, horizon):
            context.say(line)
        _say_what_learns(context, model)

        meter = Meter(model, stream.rows, runtime, context.job.peak_tflops)
        stream.changed = meter.read
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
            files=ModelFiles(model, tokens, plan.adapter is not None),
            signalled=context.signalled,
            stop_asked=context.stop_asked,
            say=context.say,
            measure=meter.facts,
        )
        with alarm.listening(model, runtime, context.folder):
            fewer = probe.noted(context.folder, runtime)
            if fewer is not None and fewer < stream.micro_batch:
                loop.limit_micro_batch(fewer, tried=False)
                context.say(f"at most {fewer} rows at a time: more ran out of memory before")
            elif settings.micro_batch == "auto" and newest is None:  # a checkpoint knows what fits
                largest = probe.largest_micro_batch(
                    model,
                    objective,
                    stream.rows,
                    runtime,
                    limit=stream.micro_batch,
                    say=context.say,
                )
                loop.limit_micro_batch(largest)
            outcome = loop.run()
        outcome.evaluation["parameters"] = float(models.parameter_count(model))
        return outcome

    return run


def targets(context: Context) -> Outcome:
    """Store a teacher's answers on `data.train`."""
    config, runtime, started = context.config, context.runtime, time.perf_counter()
    plan = config.targets
    assert plan is not None
    tokens = models.load_tokenizer(plan.teacher)
    rows = build_rows(
        config.data.train,
        tokens,
        sequence_length=config.data.sequence_length,
        packing=config.data.packing,
        limit_rows=plan.limit_rows,
        view=chat.view_of(config.data, config.stage, tokens),
    )
    attention = models.attention_implementations(config.model, runtime)
    teacher = models.load_frozen(plan.teacher, runtime, attention)
    trial.check(teacher, runtime, plan.teacher, packing=config.data.packing)
    context.say(f"targets: {copies.origin(plan.teacher)} reads {len(rows)} rows")
    folder = context.folder / "targets"
    totals = write_targets(
        folder,
        plan,
        rows,
        teacher,
        tokens,
        runtime,
        context.say,
        stop=lambda: context.signalled() or context.stop_asked(),
    )
    whole = runtime.all_sum({name: torch.tensor(total) for name, total in totals.items()})
    facts = {f"target_{name}": float(total) for name, total in whole.items()}
    context.say(f"targets: {facts['target_tokens']:,.0f} tokens in {folder}")
    seconds = time.perf_counter() - started
    if facts["target_left"]:
        return Outcome("stop" if context.stop_asked() else "signal", 0, seconds)
    return Outcome(None, 0, seconds, facts)


def evaluate(context: Context) -> Outcome:
    """Compare models on `data.validation`; each is read with its own tokenizer."""
    config, started = context.config, time.perf_counter()
    assert config.evaluate is not None
    table: list[dict[str, Any]] = []
    results: dict[str, float] = {}
    for label, reference in config.evaluate.models.items():
        tokens = models.load_tokenizer(reference)
        rows = build_rows(
            config.data.validation,
            tokens,
            sequence_length=config.data.sequence_length,
            packing=config.data.packing,
            view=chat.view_of(config.data, config.stage, tokens),
        )
        attention = models.attention_implementations(config.model, context.runtime)
        model = models.load_frozen(reference, context.runtime, attention)
        trial.check(model, context.runtime, reference, packing=config.data.packing)

        def smaller(rows: int, label: str = label) -> None:
            context.say(f"{label}: out of memory: {rows} rows at a time")

        try:
            found = score(
                model, rows, context.runtime, micro_batch=8, smaller=smaller,
                leave=context.signalled,
            )  # fmt: skip
        except Left:
            stopped = "stop" if context.stop_asked() else "signal"
            return Outcome(stopped, 0, time.perf_counter() - started)
        size = models.parameter_count(model)
        row = {"model": label, "parameters": size, "val_loss": found.loss, "ece": found.ece}
        del model  # before the next one is loaded
        table.append({**row, "val_tokens": found.tokens, **_history(reference)})
        results.update({f"{label}.val_loss": found.loss, f"{label}.ece": found.ece})
        context.say(
            f"{label}: val_loss {found.loss:.4f}, ece {found.ece:.4f} over {found.tokens} tokens,"
            f" {size:,} parameters"
        )
    if context.metrics is not None:
        context.metrics.table(table)
    return Outcome(None, 0, time.perf_counter() - started, results)


def write_json(path: Path, value: Any) -> None:
    """Atomically; numbers that are not finite become strings, which no gate takes for numbers."""
    text = json.dumps(plain(value), indent=1, sort_keys=True, allow_nan=False)
    atomic_write(path, (text + "\n").encode())


#: stage -> how it runs. Another objective is one more row.
STAGES: dict[str, Callable[[Context], Outcome]] = {
    "tokenizer": tokenizer,
    "pretrain": train(next_token.make),
    "sft": train(next_token.make),
    "targets": targets,
    "kd": train(distill.make),
    "sdce": train(sdce.make, before=sdce.before),
    "dpo": train(preference.make, preference.lay_out),
    "ipo": train(preference.make, preference.lay_out),
    "grpo": train(grpo.make, grpo.lay_out),
    "evaluate": evaluate,
    "merge": merge,
    "export": export,
    "smoke": smoke,
}


def _left(context: Context, newest: Optional[Path], seconds: float) -> Outcome:
    """The end of a stage that was asked to leave before its first step of this attempt."""
    step = 0
    if newest is not None:
        state = load_state(newest)
        step, seconds = state["step"], state["training_seconds"]
    return Outcome("stop" if context.stop_asked() else "signal", step, seconds)


def _share(config: StageConfig) -> parallel.Parallel:
    """How workers hold the stage's model. Errors: `ConfigError`."""
    assert config.train is not None
    wanted = config.train.parallel
    if why := refused(config.stage, wanted, config.model):
        raise ConfigError(f"stage {config.id}: train.parallel: {why}")
    return "ddp" if wanted == "auto" and refused(config.stage, "fsdp") else wanted


def _quicken(context: Context, model: Any) -> None:
    """Products in float8, and compiled blocks, as the stage asks: in this order, and before the
    model is sharded."""
    config = context.config
    assert config.model is not None and config.train is not None
    size, steady = float8.micro_batch_tokens(config.train, config.data)
    for line in float8.convert(
        model, config.model, context.runtime, tokens=size, steady=steady,
        compiled=config.model.compile,
    ):  # fmt: skip
        context.say(line)
    if config.model.compile:
        blocks.compile_blocks(model, packing=config.data.packing)


def _say_what_learns(context: Context, model: Any) -> None:
    mask = frozen_mask(model)
    if context.runtime.main:
        write_json(context.folder / "frozen_mask.json", mask)
    if mask["frozen"]["parameters"]:
        learns = mask["trainable"]
        context.say(
            f"trainable: {learns['parameters']:,} of {mask['parameters']:,} parameters"
            f" ({learns['share']:.2%}) in {learns['tensors']} tensors; frozen_mask.json lists them"
        )


def _curriculum(context: Context, rows: Rows, micro_batch: int, accumulate: int) -> Stream:
    """The stream of `rows` whose first ones are shorter. Errors: `ConfigError`."""
    config, runtime = context.config, context.runtime
    if (wrong := phases.problem(config)) is not None:
        raise ConfigError(f"stage {config.id}: {'.'.join(map(str, wrong[0]))}: {wrong[1]}")
    assert config.train is not None
    return Curriculum(
        rows,
        config.data.curriculum,
        micro_batch=micro_batch,
        accumulate=accumulate,
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=config.train.seed,
    )


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
