"""The objective of the stages `dpo` and `ipo`, their pairs of answers, and their reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Optional

from torch import nn

from trainer import copies, models, parallel, probe, trial
from trainer.checkpoint import rng_state, set_rng_state
from trainer.config import ConfigError, Preference, Source, preference_problems, to_dict
from trainer.context import Context
from trainer.data.pairs import build_pairs
from trainer.data.stream import Rows
from trainer.evaluate import held_out_rows
from trainer.fingerprint import fingerprint
from trainer.makers import next_token
from trainer.objective import Objective
from trainer.objectives.preference import Prefer
from trainer.reference import Known, precompute

#: Rows of the reference's forward pass, at most; halved when they do not fit.
_ROWS = 8


def make(context: Context, tokens: Any) -> Objective:
    """Errors: `ConfigError` for settings that do not go together; `Left` when the job was asked to
    leave while the reference read the pairs."""
    config = context.config
    assert config.model is not None
    plan = config.preference or Preference()
    for key, what in preference_problems(config.stage, plan, config.model):
        raise ConfigError(f"stage {config.id}: preference.{key}: {what}")
    _part(context)
    kind: Literal["dpo", "ipo"] = "ipo" if config.stage == "ipo" else "dpo"
    known = None
    if plan.reference == "adapter":
        context.say("reference: the model with its adapter switched off, at each step")
    else:
        known = _known(context, tokens)
    return Prefer(kind, plan, context.runtime, known)


def lay_out(
    context: Context, tokens: Any, sources: tuple[Source, ...], limit: Optional[int]
) -> Rows:
    """The rows of the pairs of `sources`, at most `limit`. Errors: those of `build_pairs`."""
    return next_token.lay_out(context, tokens, sources, limit, build_pairs)


def _part(context: Context) -> None:
    """Have the two answers of a row read in a row each, where they would see each other."""
    model, rows = context.model, context.rows
    assert model is not None and rows is not None
    if context.config.data.packing or trial.may_share_rows(model, context.runtime):
        return
    rows.apart = True
    if context.held_out is not None:
        context.held_out.apart = True
    context.say("pairs: each answer is read in a row of its own; in one they would see each other")


def _known(context: Context, tokens: Any) -> Known:
    """The log-probs by the model as the stage found it, also where a run is resumed."""
    config, runtime, rows = context.config, context.runtime, context.rows
    assert config.model is not None and config.train is not None and rows is not None
    plan, settings = config.model, config.train

    def start() -> nn.Module:
        if context.fresh and context.model is not None:
            return context.model
        # Of another model than the one that goes on: random numbers are to be as they were.
        state = rng_state()
        shared = context.model is not None and parallel.is_sharded(context.model)
        found = models.load_model(
            replace(plan, gradient_checkpointing=False), tokens, runtime, settings.seed,
            share="fsdp" if shared else "ddp",
        )  # fmt: skip
        set_rng_state(state)
        context.say(f"reference: {models.parameter_count(found):,} parameters, read in again")
        return found

    about: dict[str, Any] = {
        "version": 1,
        "model": _called(plan.name) if plan.name is not None else None,
        "architecture": to_dict(plan.architecture) if plan.architecture is not None else None,
        "seed": settings.seed if plan.init == "random" else None,
        "precision": runtime.precision,
        "quantization": plan.adapter and plan.adapter.quantization,
    }
    if runtime.main and plan.init == "pretrained" and (digest := fingerprint(str(plan.name))):
        about["checkpoint"] = digest
    read = [rows]
    if context.held_out is not None:
        read.append(context.held_out.first(held_out_rows(settings)))
    fits = min(probe.first_cut(settings, runtime.world_size)[0], _ROWS)
    if (fewer := probe.noted(context.folder, runtime)) is not None:
        fits = min(fits, fewer)
    known = precompute(
        context.folder,
        read,
        start,
        runtime,
        about=about,
        micro_batch=fits,
        say=context.say,
        leave=context.signalled,
    )
    runtime.release_memory()  # of the starting model, if it was read in again
    return known


def _called(name: str) -> str:
    """A model reference as it is on any machine: a run that moves keeps its stages, not the folder
    that holds them."""
    origin = copies.origin(name)
    return Path(origin).name if Path(origin).is_absolute() else origin
