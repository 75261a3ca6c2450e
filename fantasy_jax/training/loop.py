"""The loop: batches in, steps, a bar, logs, checkpoints, and a stop that loses nothing."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from fantasy_jax.cli import Stopped
from fantasy_jax.config import ConfigError
from fantasy_jax.sharding import assemble_batch, rows_of_this_process
from fantasy_jax.training.checkpoint import Checkpoints
from fantasy_jax.training.events import Events
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.parameters import EVERYTHING, Rules
from fantasy_jax.training.state import Batch, Loss, Metrics, Trainer
from fantasy_jax.typing import UInt8


@dataclass(frozen=True)
class LoopConfig:
    """What a run does beside its steps.

    Attributes:
        log_every: Steps between two looks at the loss.
        save_every: Steps between two checkpoints.
        keep_last: So many of the newest are kept.
        keep_every: And those whose step is a multiple of this; 0 for none.
        show_every: Steps between two sample pictures; 0 for none.
        show_videos: Whether samples are also written as mp4 with their sound, into `samples`. Nobody needs
            thousands of files of what pictures show, so only when asked for.
        validate_every: Steps between two looks at the loss of held-out clips; 0 for none. One costs about as
            much as two steps.
        grace_seconds: From SIGTERM to the end by force. Two steps (several processes agree on the next) and
            two saves (one may be under way) must fit; the run warns at its first save if they do not.
        workers: Processes that read and prepare batches; 0 reads in the run's own.
        seed: Of initial weights, data order, noise and dropout.
    """

    log_every: int = 20
    save_every: int = 500
    keep_last: int = 2
    keep_every: int = 0
    show_every: int = 500
    show_videos: bool = False
    validate_every: int = 500
    grace_seconds: float = 30.0
    workers: int = 1
    seed: int = 0

    def __post_init__(self):
        for name in ("log_every", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        for name in ("keep_every", "show_every", "validate_every", "grace_seconds", "workers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative")


@dataclass(frozen=True)
class Task:
    """A thing to train.

    Attributes:
        name: Of the stage.
        model: Where it starts.
        loss: What is lowered.
        batches: Gives the batches from a step on: `data.loader.batches` with its source and preparation.
        batch_size: Examples in each.
        steps: How long.
        optimizer: How.
        parameters: Which of the model's are trained.
        show: Makes pictures of what the model can do by now, and writes videos into a folder, if it is given
            one; None: there are none.
        validate: Measures it on held-out examples; None: it is not.
        settings: Everything that decides the result; a run goes on only with the same.
    """

    name: str
    model: nnx.Module
    loss: Loss
    batches: Callable[..., Iterator[Batch]]
    batch_size: int
    steps: int
    optimizer: OptimizerConfig
    parameters: Rules = EVERYTHING
    show: Callable[[nnx.Module, Path | None], dict[str, UInt8[np.ndarray, "H W 3"]]] | None = None
    validate: Callable[[nnx.Module], dict[str, float]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def train(task: Task, config: LoopConfig, folder: Path, mesh: Mesh) -> nnx.Module:
    """Trains until the task's last step, or from where an earlier call stopped.

    Args:
        task: What.
        config: What is done on the way.
        folder: For checkpoints and TensorBoard's files.
        mesh: Of all devices of all processes.

    Returns:
        The model with the running mean of its parameters, if one is kept.

    Raises:
        Stopped: SIGINT or SIGTERM came; everything is saved.
        FloatingPointError: A step was not finite; what was before it is saved.
        ConfigError: The folder holds a run with other settings, or devices cannot share a batch evenly.
    """
    with jax.set_mesh(mesh):
        run = _Run(task, config, folder, mesh)
        try:
            if run.step < task.steps:
                run.go()
        finally:
            run.checkpoints.close()
        return run.trainer.model(run.state.result)


class _Run:
    """One task on its way."""

    def __init__(self, task: Task, config: LoopConfig, folder: Path, mesh: Mesh):
        self.task, self.config, self.folder, self.mesh = task, config, folder, mesh
        rows_of_this_process(task.batch_size // task.optimizer.accumulate, mesh)  # or it raises
        self.rows = rows_of_this_process(task.batch_size, mesh)
        self.trainer = Trainer(
            task.model,
            task.loss,
            task.optimizer,
            task.steps,
            seed=config.seed,
            mesh=mesh,
            rules=task.parameters,
        )
        self.checkpoints = Checkpoints(
            folder / "checkpoints", task.settings, keep_last=config.keep_last, keep_every=config.keep_every
        )
        self.state = self.checkpoints.restore(self.trainer.initial())
        self.step = int(self.state.step)
        self.save_seconds: float | None = None

    def go(self) -> None:
        """Steps to the end, or to a signal to stop."""
        task, config = self.task, self.config
        first = jax.process_index() == 0
        bar = tqdm(
            total=task.steps,
            initial=self.step,
            desc=task.name,
            unit="step",
            smoothing=0.05,
            disable=not first,
            postfix="compiling",
        )
        with _stop_signals() as stop, Events(self.folder if first else None) as events, bar:
            clock, previous = _Clock(self.step), None
            read = task.batches(
                batch_size=task.batch_size,
                start=self.step,
                workers=config.workers,
                seed=config.seed,
                rows=self.rows.tolist(),
            )
            for local in read:
                records = local.pop("record", None)
                batch = assemble_batch(local, self.rows, task.batch_size, self.mesh)
                number = jax.device_put(np.int32(self.step), NamedSharding(self.mesh, PartitionSpec()))
                self.state, metrics = self.trainer.step(self.state, self.trainer.rest, batch, number)
                if previous is None:  # no later step takes as long
                    jax.block_until_ready(metrics)
                    bar.unpause()
                    clock = _Clock(self.step)
                else:  # while this step runs
                    self._check(*previous)
                self.step += 1
                previous = (metrics, records)
                bar.update()
                last = self.step == task.steps
                if self.step % config.log_every == 0 or last:
                    self._check(*previous)
                    self._log(metrics, clock, events, bar)
                looks = self._due(last)
                stopping = self._stops(stop)
                # Before a look, too: told to stop in the middle of one, the run has nothing left to save.
                if self.step % config.save_every == 0 or last or looks or stopping:
                    self._check(*previous)
                    self._save_and_time(clock, events)
                if looks and not stopping:
                    for look in looks:
                        look(events)
                    clock.reset(self.step)
                    stopping = self._stops(stop)
                if stopping:
                    self.checkpoints.wait()
                    raise Stopped(
                        f"{task.name}: stopped and saved at step {self.step} of {task.steps}; "
                        "the same command goes on from there",
                        stop[0] if stop else signal.SIGTERM,
                    )
                if last:
                    break

    def _check(self, metrics: Metrics, records: np.ndarray | None) -> None:
        """Stops before anything is built on a step that was not finite, which has left the state alone."""
        if bool(metrics["finite"]):
            return
        self.step = int(self.state.step)
        self._save()
        among = "" if records is None else f" (records {', '.join(map(str, records))})"
        raise FloatingPointError(
            f"{self.task.name}: step {self.step + 1}{among} is not finite (loss {float(metrics['loss'])}); "
            f"step {self.step} is saved in {self.checkpoints.folder}; look at the records, or lower the "
            "learning rate"
        )

    def _stops(self, received: list[int]) -> bool:
        """Whether it is time to stop.

        Of several processes any may be told, and all must save the same step: JAX passes the signal on beside
        the steps, and agrees on one that none of them has reached.
        """
        if jax.process_count() == 1:
            return bool(received)
        return multihost_utils.reached_preemption_sync_point(self.step)

    def _log(self, metrics: Metrics, clock: "_Clock", events: Events, bar: tqdm) -> None:
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items() if name != "finite"}
        numbers["seconds_per_step"] = clock.per_step(self.step)
        events.numbers({f"{self.task.name}/{name}": value for name, value in numbers.items()}, self.step)
        bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {numbers['seconds_per_step']:.2f} s a step")

    def _save(self) -> None:
        self.checkpoints.save(self.state, {"step": self.step, "examples": self.step * self.task.batch_size})

    def _due(self, last: bool) -> list[Callable[[Events], None]]:
        """What shows and measures what the model can do, if it is time."""
        task, config = self.task, self.config
        looks = (
            (task.validate, config.validate_every, self._validate),
            (task.show, config.show_every, self._show),
        )
        return [look for given, every, look in looks if given and every and (last or self.step % every == 0)]

    def _validate(self, events: Events) -> None:
        found = self.task.validate(self.trainer.model(self.state.result))
        name = f"{self.task.name}/validation"
        events.numbers({f"{name}/{key}": value for key, value in found.items()}, self.step)

    def _save_and_time(self, clock: "_Clock", events: Events) -> None:
        """Saves; waits for the run's first save, to know whether a stop would leave time for another."""
        step_seconds, begun, grace = clock.per_step(self.step), time.perf_counter(), self.config.grace_seconds
        self._save()
        if self.save_seconds is not None:
            return
        self.checkpoints.wait()
        self.save_seconds = time.perf_counter() - begun
        clock.reset(self.step)
        events.numbers({f"{self.task.name}/save_seconds": self.save_seconds}, self.step)
        if 2 * (step_seconds + self.save_seconds) > grace:
            logging.getLogger(__name__).warning(
                "%s: a step takes %.1f s and a save %.1f s; after SIGTERM two of each may take more than "
                "grace_seconds, %g; have the signal sent earlier and raise train.loop.grace_seconds, or save "
                "to faster storage",
                self.task.name,
                step_seconds,
                self.save_seconds,
                grace,
            )

    def _show(self, events: Events) -> None:
        films = self.config.show_videos and jax.process_index() == 0
        videos = self.folder / f"samples/{self.step:06d}" if films else None
        made = self.task.show(self.trainer.model(self.state.result), videos)
        events.pictures({f"{self.task.name}/{name}": picture for name, picture in made.items()}, self.step)


class _Clock:
    """Seconds a step since the last look."""

    def __init__(self, step: int):
        self.latest = 0.0
        self.reset(step)

    def reset(self, step: int) -> None:
        self.begun, self.seen = time.perf_counter(), step

    def per_step(self, step: int) -> float:
        if step > self.seen:
            self.latest = (time.perf_counter() - self.begun) / (step - self.seen)
            self.reset(step)
        return self.latest


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM are put in, instead of ending the process in the middle of a step.

    In one of several processes JAX has a handler for SIGTERM, and SIGINT is made one.
    """
    received: list[int] = []
    several = jax.process_count() > 1

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    wanted = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, receive) for number in wanted]
    try:
        yield received
    finally:
        for number, handler in zip(wanted, before, strict=True):
            signal.signal(number, handler)
