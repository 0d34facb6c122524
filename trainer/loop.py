"""The loop: one definition of a step for every objective. It never branches on the stage."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from trainer import copies, parallel, probe
from trainer.batch import Batch
from trainer.checkpoint import (
    CheckpointError,
    Checkpoints,
    crash_dump,
    load_state,
    rng_state,
    set_rng_state,
)
from trainer.config import ConfigError, Train
from trainer.data.stream import Rows, Stream
from trainer.evaluate import Left, held_out, held_out_rows
from trainer.flags import Flags
from trainer.guard import Abort, Guard, Retry, SkipStep
from trainer.metrics import COUNTS, SHOWN, Metrics
from trainer.objective import Objective, divided
from trainer.optimizer import clip, make_optimizer, unscale
from trainer.runtime import Runtime
from trainer.saver import Files, Saver
from trainer.scaler import Scaler
from trainer.schedule import Horizon, learning_rate
from trainer.sharded import PARAMETERS, Shards, parameter_shapes
from trainer.shards import optimizer_state
from trainer.step import Accumulated, backward, cut, normalisers, prepare
from trainer.window import Window


class NonFiniteError(RuntimeError):
    """Two non-finite steps in a row; `crash_dump.pt` holds the state."""


@dataclass
class Outcome:
    """How a stage ended. `stopped`: None when the horizon was reached, else `until`, `stop` (the
    marker asked) or `signal`."""

    stopped: Optional[str]
    step: int
    training_seconds: float
    evaluation: dict[str, float] = field(default_factory=dict)


class Loop:
    """Trains `model` with `objective` on `stream` until the horizon, a pause or a signal.
    `metrics` and `checkpoints` are None on ranks that do not write. `resume_from`: the checkpoint
    whose weights `model` already has."""

    def __init__(
        self,
        config: Train,
        *,
        folder: Path,
        horizon: Horizon,
        model: nn.Module,
        objective: Objective,
        stream: Stream,
        validation: Optional[Rows],
        runtime: Runtime,
        metrics: Optional[Metrics],
        checkpoints: Optional[Checkpoints],
        resume_from: Optional[Path],
        files: Files,
        signalled: Callable[[], bool],
        stop_asked: Callable[[], bool],
        say: Callable[[str], None],
        measure: Optional[Callable[[float], dict[str, float]]] = None,
    ) -> None:
        self.config, self.folder, self.horizon = config, folder, horizon
        self.model, self.objective, self.stream = model, objective, stream
        self.validation, self.runtime, self.metrics = validation, runtime, metrics
        self.checkpoints, self.resume_from = checkpoints, resume_from
        self.signalled, self.stop_asked, self.say = signalled, stop_asked, say
        self.measure = measure  # rows a second -> further facts of a logged step
        self.optimizer = make_optimizer(model, config)
        shards = None
        if parallel.is_sharded(model) or (config.sharded and runtime.world_size > 1):
            shards = Shards(model, self.optimizer, runtime, folder)
        self.saver = Saver(checkpoints, files, runtime, shards, config.save_async)
        self.guard = Guard()
        self.scaler = Scaler() if runtime.precision == "fp16" else None
        self._largest: Optional[int] = None
        self._has_room = False
        self._ballast: list[Tensor] = []  # of the first step: room for the optimizer's moments
        self.step = 0
        self.tokens = 0.0
        self.training_seconds = 0.0
        self.best: Optional[float] = None
        self.evaluation: dict[str, float] = {}
        self._saved_at = 0  # nothing is lost before the first step
        self._evaluated_at = -1
        self._flags = Flags()
        self._window = Window(0.0)

    def run(self) -> Outcome:
        """Train. Errors: `NonFiniteError`; `ConfigError` when one row does not fit in memory;
        `CheckpointError`, at the latest at the step's end that follows a save."""
        try:
            return self._train()
        finally:
            self._end_saving()

    def _train(self) -> Outcome:
        if self.resume_from is not None:
            self._resume(self.resume_from)
        if not self._has_room:
            self.make_room()
        stopped = self._reason_to_stop()
        if self.step > 0:
            stopped = self._evaluate_if_due(stopped)  # a stop may have come before it
        while stopped == "":
            rate, norm = self._one_step()
            stopped = self._reason_to_stop()
            if logged := self._logged(self.step) or stopped != "":
                self._log(rate, norm)
            stopped = self._evaluate_if_due(stopped)
            if stopped != "" and not logged:
                self._log(rate, norm)
            if self._due(self.config.save_every):
                self._save()
        self._check_flags(keep=0)
        if stopped == "signal" and self.stop_asked():
            stopped = "stop"
        if stopped is not None:
            self._event("stopped", reason=stopped)
        self._save(wait=True)
        return Outcome(stopped, self.step, self.training_seconds, self.evaluation)

    def limit_micro_batch(self, rows: int, tried: bool = True) -> None:
        """At most `rows` in a micro-batch, of the same global batch; checkpoints remember it.
        `tried`: that many fit."""
        self._resize(rows)
        self._has_room = tried
        self._event("micro_batch", micro_batch=rows)

    def make_room(self) -> None:
        """Try the longest rows, and cut smaller where they do not fit: before the first step, and
        whenever rows become longer. Packed rows are all alike, so any step tries the longest: the
        first one beside what the optimizer will need."""
        self._has_room = True
        if self.stream.rows.fixed:
            self._ballast = probe.ballast(self.model, self.runtime, self.optimizer)
        else:
            probe.make_room(
                self.model,
                self.objective,
                self.stream.rows,
                self.runtime,
                self.optimizer,
                micro_batch=self.stream.micro_batch,
                smaller=self._smaller,
            )

    def _resume(self, found: Path) -> None:
        """Go on exactly where the checkpoint was written."""
        state = load_state(found)
        held = optimizer_state(found, state, self.model, self.optimizer)
        self.optimizer.load_state_dict(held)
        self.stream.load_state_dict(state["stream"])
        mine = self.runtime.rank if len(state["rng"]) == self.runtime.world_size else 0
        held_by_all = state["objective"]  # earlier checkpoints hold one for all workers
        self.objective.load_state_dict(
            held_by_all[mine] if isinstance(held_by_all, list) else held_by_all
        )
        self.step, self.tokens = state["step"], state["tokens"]
        self.training_seconds, self.best = state["training_seconds"], state["best"]
        self.evaluation = state["evaluation"]
        self.guard.consecutive = state["consecutive"]
        if self.scaler is not None and state.get("scaler") is not None:
            self.scaler.load_state_dict(state["scaler"])
        # Also what is known besides: a curriculum cuts as configured when it goes to its phase.
        if known := [n for n in (state["micro_batch"], self._largest) if n is not None]:
            self._largest = min(known)
            self.stream.resize(min(self._largest, self.stream.micro_batch))
        self._saved_at = self.step
        self._evaluated_at = state.get("evaluated_at", self.step)
        self._window = Window(self.training_seconds)
        if self.checkpoints is not None:
            # The process may have been killed between the checkpoint and its pointers.
            self.checkpoints.mark_last(self.step, self._val_loss())
            if self.evaluation.get("best_step") == self.step:
                self.checkpoints.mark_best(self.step, self.best)
        states = state["rng"]
        if len(states) == self.runtime.world_size:
            set_rng_state(states[self.runtime.rank])
        else:
            self.say(
                f"the checkpoint is of {len(states)} workers, now there are"
                f" {self.runtime.world_size}: random numbers (dropout) are others from here on"
            )
        rows = self.stream.rows_per_step
        if (before := state.get("rows_per_step", rows)) != rows:
            self.say(
                f"WARNING: a step now takes {rows} rows, in the checkpoint {before}; change"
                " micro_batch or accumulate to go on with the same training"
            )
        self._event("resumed", checkpoint=found.name)
        self.say(f"resumed at step {self.step} from {copies.origin(str(found))}")

    def _one_step(self) -> tuple[float, Tensor]:
        """One optimizer step; its learning rate and the norm of its gradient."""
        started = time.perf_counter()
        config, step = self.config, self.step
        if self.stream.advance(step, self.horizon.progress(step, self.training_seconds)):
            self._lengthened()
        group = self.stream.next_group()
        done, norm = self._gradients(group, self._logged(step + 1))
        self._ballast.clear()
        clip(self.model, norm, config.clip)
        rate = learning_rate(
            config, self.horizon.progress(step, self.training_seconds), step, self.horizon
        )
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        # The fused optimizer leaves weights and its own state untouched where found_inf is 1.
        found_inf = (~torch.isfinite(norm)).float()
        self.optimizer.found_inf = found_inf
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._window.add(done, sum(batch.rows for batch in group), found_inf)
        self._flags.put(self.step, found_inf)
        self._check_flags(keep=1)
        if self._logged(self.step):
            self.runtime.finish()  # or the speed would be that of asking, not of doing
        self.training_seconds += time.perf_counter() - started
        return rate, norm

    def _gradients(self, group: list[Batch], log: bool) -> tuple[Accumulated, Tensor]:
        """The gradients of the global batch and their norm [0-dim]; after an out-of-memory on any
        rank, again in halves."""
        progress = self.horizon.progress(self.step, self.training_seconds)
        while True:
            rows = max(batch.rows for batch in group)
            batches = parallel.attempt(
                self.model, rows, prepare, self.objective, group, self.runtime, self.step, progress
            )
            if not self.runtime.any(batches is None)[0] and batches is not None:
                found = self._backward(batches, log, rows)
                if found is not None:
                    return found
            batches = None
            self.optimizer.zero_grad(set_to_none=True)
            self.runtime.release_memory()
            group = cut(group, self._smaller(rows))

    def _backward(
        self, batches: list[Batch], log: bool, rows: int
    ) -> Optional[tuple[Accumulated, Tensor]]:
        """What `_gradients` returns, from a prepared group, of micro-batches of `rows` before; None
        after an out-of-memory on any rank. Gradients that overflow in fp16 are dropped, and the
        same group goes through again with the same random numbers and a smaller loss scale."""
        weights = normalisers(batches, self.runtime)
        random = rng_state() if self.scaler is not None else {}
        while True:
            scale = self.scaler.scale if self.scaler is not None else 1.0
            done = parallel.attempt(
                self.model, rows, backward, self.model, self.objective, batches, weights,
                self.runtime, log, scale,
            )  # fmt: skip
            ready = parallel.reduce_gradients(self.model, self.runtime, done is not None)
            if not ready or done is None:
                return None
            norm = unscale(self.model, scale)
            if self.scaler is None or not self._overflowed(self.scaler, done, norm):
                return done, norm
            self.optimizer.zero_grad(set_to_none=True)
            set_rng_state(random)

    def _overflowed(self, scaler: Scaler, done: Accumulated, norm: Tensor) -> bool:
        """Whether to try a smaller loss scale, which is then set. This waits for the device. Every
        rank holds the same reduced gradients, so all decide the same."""
        if bool(torch.isfinite(norm)):
            scaler.passed()
            return False
        # The forward pass knows no scale: a loss that is not finite stays so at any.
        (hopeless,) = self.runtime.any(not bool(torch.isfinite(done.total)))
        if hopeless or not scaler.lower():
            scaler.give_up()
            return False
        self._event("overflow_retry", step=self.step + 1, scale=scaler.scale)
        self.say(f"step {self.step + 1}: fp16 overflow, again with loss scale {scaler.scale:g}")
        return True

    def _smaller(self, tried: int) -> int:
        """The rows of a micro-batch from now on, after an out-of-memory with `tried` of them.
        Errors: `ConfigError` when that was one row, which cannot be cut."""
        if tried == 1 and (parts := divided(self.objective)):
            self._event("oom_split", micro_batch=1, tried=1)
            self.say(f"out of memory with one row: {parts}")
            return 1
        decision = self.guard.out_of_memory(tried)
        if not isinstance(decision, Retry):
            assert isinstance(decision, Abort)
            raise ConfigError(decision.reason)
        self._resize(decision.micro_batch)
        self._event("oom_split", micro_batch=decision.micro_batch, tried=tried)
        self.say(f"out of memory with {tried} rows: going on with {decision.micro_batch}")
        return decision.micro_batch

    def _resize(self, rows: int) -> None:
        self._largest = rows
        self.stream.resize(rows)

    def _lengthened(self) -> None:
        """Rows became longer: what was learned of memory is said in theirs, and tried again."""
        rows, length = self.stream.micro_batch, self.stream.rows.sequence_length
        self._largest = rows if self._largest is not None else None
        self._event("sequence_length", sequence_length=length, micro_batch=rows)
        self.say(f"step {self.step + 1}: rows of {length} tokens from here on, {rows} at a time")
        self.make_room()

    def _check_flags(self, keep: int) -> None:
        for step, finite in self._flags.read(keep):
            decision = self.guard.finite(finite)
            if isinstance(decision, SkipStep):
                self._event("nan_skipped", step=step)
                self.say(f"step {step}: not finite, skipped; weights and optimizer are untouched")
            elif isinstance(decision, Abort):
                self._event("aborted", step=step, reason=decision.reason)
                self._crash(decision.reason)

    def _crash(self, reason: str) -> None:
        kept = f"state and batch shapes are in {self.folder / 'crash_dump.pt'}"
        model = self.saver.files.tensors()  # all ranks: each may hold a part
        if self.runtime.main:
            shape = [self.stream.micro_batch, self.stream.rows.sequence_length]
            state = parallel.local_parts(self._state([], []))
            try:
                crash_dump(self.folder, {**state, "model": model, "batch_shape": shape})
            except CheckpointError as error:
                kept = str(error)
        self.runtime.barrier()  # a rank that leaves first would have torchrun end the others
        raise NonFiniteError(f"step {self.step}: {reason}; {kept}")

    def _log(self, rate: float, norm: Tensor) -> None:
        facts, tokens = self._window.close(self.runtime, self.training_seconds)
        self._window = Window(self.training_seconds)
        self.tokens += tokens
        facts.update(lr=rate, grad_norm=float(norm), tokens=self.tokens)
        if self.scaler is not None:
            facts["scale"] = self.scaler.scale
        memory = self.runtime.memory_mb()
        if memory is not None:
            facts["gpu_mem_alloc_MB"] = memory
        if self.horizon.steps:
            facts["steps"] = self.horizon.steps
        if self.metrics is None:
            return
        if self.measure is not None:
            facts.update(self.measure(facts["examples_per_sec"]))
        self.metrics.step(self.step, **facts)
        of = f"/{self.horizon.steps}" if self.horizon.steps else ""
        words = "  ".join(f"{name} {facts[name]:.4f}" for name in SHOWN if name in facts)
        speed = f"{facts['tokens_per_sec']:.0f} tok/s"
        self.say(f"step {self.step}{of}  {words}  lr {rate:.2e}  {speed}")

    def _logged(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == 1

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _reason_to_stop(self) -> Optional[str]:
        """None: the horizon is reached; "": go on; else why to stop before it."""
        if self.horizon.seconds is not None:
            # Clocks differ between ranks; the learning rate must not.
            self.training_seconds = self.runtime.largest(self.training_seconds)
        signalled, failed = self.runtime.any(self.signalled(), self.saver.failed)
        if failed:
            self.saver.wait()
        self._tell_saved()
        if self.horizon.progress(self.step, self.training_seconds) >= 1.0:
            return None
        if signalled:
            return "signal"
        if self.config.until is not None and self.step >= self.config.until:
            return "until"
        return ""

    def _evaluate_if_due(self, stopped: Optional[str]) -> Optional[str]:
        """Evaluate, at the end or where it is time to; the reason to stop, which may be a new one.
        A signal ends an evaluation; when the stage goes on later, it begins with that."""
        due = stopped is None or self._due(self.config.evaluate_every)
        if self.validation is None or self._evaluated_at == self.step or not due:
            return stopped
        try:
            self._evaluate(self.validation)
        except Left:
            self._event("evaluation_left")
            self.say(f"step {self.step}: the evaluation was left, the job was asked to leave")
            return stopped or "signal"
        return self._reason_to_stop() if stopped == "" else stopped

    def _evaluate(self, validation: Rows) -> None:
        facts = held_out(
            self.model,
            validation,
            self.runtime,
            self.objective,
            micro_batch=self.stream.reading_batch,
            limit=held_out_rows(self.config),
            smaller=self._evaluate_smaller,
            leave=self.signalled,
        )
        loss = facts["val_loss"]
        self._evaluated_at = self.step
        self._saved_at = -1  # what may be saved of this step does not hold this
        improved = math.isfinite(loss) and (self.best is None or loss < self.best)
        if improved:
            self.best = loss
            self.evaluation.update(best_val_loss=loss, best_step=float(self.step))
        self.evaluation.update(facts)
        if self.metrics is not None:
            self.metrics.eval(self.step, **facts)
            shown = {name: value for name, value in facts.items() if name not in COUNTS}
            words = (f"{k} {v:.{2 if k == 'val_ppl' else 4}f}" for k, v in shown.items())
            self.say(f"step {self.step}  " + "  ".join(words))
        if improved:
            self._save(best=True)

    def _evaluate_smaller(self, rows: int) -> None:
        self._event("oom_split", micro_batch=rows, evaluation=True)
        self.say(f"step {self.step}: out of memory in the evaluation: {rows} rows at a time")

    def _save(self, best: bool = False, wait: bool = False) -> None:
        """Save this step, unless it is saved. `wait`: nothing is being written on return."""
        if self._saved_at != self.step:
            self._check_flags(keep=0)  # the state counts the steps that were not finite
            self._saved_at = self.step
            held = self.runtime.gather((rng_state(), self.objective.state_dict()))
            state = self._state([rng for rng, _ in held], [state for _, state in held])
            with parallel.gathering(self.stream.micro_batch):
                self.saver.save(self.step, state, val_loss=self._val_loss(), best=best, wait=wait)
        if wait:
            self.saver.wait()
        self._tell_saved()

    def _val_loss(self) -> Optional[float]:
        """Of this step, if it was evaluated."""
        return self.evaluation.get("val_loss") if self._evaluated_at == self.step else None

    def _tell_saved(self) -> None:
        """Report what is saved by now."""
        while self.saver.news:
            saved = self.saver.news.popleft()
            if self.metrics is not None:
                self.metrics.event("checkpoint", saved.step, path=saved.path.name, best=saved.best)
            best = " (best)" if saved.best else ""
            self.say(f"step {saved.step}  saved {copies.origin(str(saved.path))}{best}")

    def _end_saving(self) -> None:
        """Nothing is being written when `run` is left, whatever the reason."""
        error = self.saver.close()
        if error is not None:  # the loop was on its way out with another one
            self.say(f"WARNING: the last save failed: {error}")

    def _state(self, rng: list[Any], objective: list[Any]) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens + float(self._window.tokens),
            "training_seconds": self.training_seconds,
            "best": self.best,
            "evaluation": dict(self.evaluation),
            "evaluated_at": self._evaluated_at,
            "consecutive": self.guard.consecutive,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "micro_batch": self._largest,  # what an out-of-memory taught; None: nothing yet
            "optimizer": self.optimizer.state_dict(),
            PARAMETERS: parameter_shapes(self.model, self.optimizer),
            "stream": self.stream.state_dict(),
            "rows_per_step": self.stream.rows_per_step,
            "objective": objective,  # of every worker, as are random numbers
            "rng": rng,
        }

    def _event(self, name: str, **facts: Any) -> None:
        if self.metrics is not None:
            self.metrics.event(name, self.step, **facts)
