"""The training loop: batches, steps, logs, checkpoints, and a stop on signals that loses no step."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from fantasy_jax.config import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Seed, Settings
from fantasy_jax.disk import full_disk_reported
from fantasy_jax.errors import ConfigError, Stopped
from fantasy_jax.files import lock_folder
from fantasy_jax.sharding import make_global_batch, process_rows
from fantasy_jax.training.checkpoint import Checkpoints
from fantasy_jax.training.events import Events
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.parameters import ALL_TRAINED, ParameterRules
from fantasy_jax.training.peers import failing_together
from fantasy_jax.training.state import Batch, Loss, Metrics, Trainer
from fantasy_jax.typing import UInt8


@dataclass(frozen=True)
class LoopConfig(Settings):
    """Logging, checkpoints, samples and the data loader of a run.

    Attributes:
        log_every: Steps from one log of the metrics to the next.
        save_every: Steps from one checkpoint to the next.
        keep_last: Number of newest checkpoints that are kept.
        keep_every: Checkpoints whose step is a multiple of this are kept too; 0 for none.
        sample_every: Steps from one set of sample images to the next; 0 for none.
        sample_videos: Whether samples are also written as mp4 with their audio, into `samples`.
        validate_every: Steps from one loss of held-out clips to the next; 0 for none. One costs about as much
            as two steps.
        grace_seconds: Time from SIGTERM to SIGKILL. Two steps (several processes agree on the next one) and
            two saves (one may be pending) must fit; otherwise the run warns at its first save.
        num_workers: Processes that read and prepare batches; 0 reads in threads of the run's own process.
        seed: Seed of initial weights, data order, noise and dropout.
    """

    log_every: PositiveInt = 20
    save_every: PositiveInt = 500
    keep_last: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    sample_every: NonNegativeInt = 500
    sample_videos: bool = False
    validate_every: NonNegativeInt = 500
    grace_seconds: NonNegativeFloat = 30.0
    num_workers: Annotated[int, Range(0, 1024)] = 1
    seed: Seed = 0


@dataclass(frozen=True)
class TrainingTask:
    """One model to train.

    Attributes:
        name: Name of the stage.
        model: Initial model.
        loss: Loss to minimise.
        batches: Returns the batches from a step on: `data.loader.batches` with its source and transform.
        batch_size: Examples in a batch of all processes.
        num_steps: Length of the run.
        optimizer: Settings of the optimizer.
        parameters: Which parameters are trained.
        sample: `(model, folder) -> images`: samples from the model, and writes videos into `folder` unless it
            is None. None for a model that is not sampled from.
        validate: Returns metrics of held-out examples; None for none.
        settings: Everything that decides the result, by config names, except for the number of steps; a run
            resumes only with the same settings.
    """

    name: str
    model: nnx.Module
    loss: Loss
    batches: Callable[..., Iterator[Batch]]
    batch_size: int
    num_steps: int
    optimizer: OptimizerConfig
    parameters: ParameterRules = ALL_TRAINED
    sample: Callable[[nnx.Module, Path | None], dict[str, UInt8[np.ndarray, "H W 3"]]] | None = None
    validate: Callable[[nnx.Module], dict[str, float]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def checkpoint_folder(folder: Path) -> Path:
    """The folder of checkpoints of a run in a folder."""
    return folder / "checkpoints"


def train(task: TrainingTask, config: LoopConfig, folder: Path, mesh: Mesh) -> nnx.Module:
    """Trains until the task's last step, starting from the newest checkpoint in `folder` if there is one.

    Args:
        task: What to train.
        config: Logs, checkpoints and loader.
        folder: Folder of the checkpoints and TensorBoard files; one run at a time may use it.
        mesh: Mesh of all devices of all processes.

    Returns:
        The model with the moving average of its parameters, if one is kept.

    Raises:
        Stopped: SIGINT or SIGTERM was received; everything is saved.
        FloatingPointError: A step was not finite; the state before it is saved.
        ConfigError: The folder holds a run with other settings or one that another process trains, or the
            batch cannot be sharded evenly, or every checkpoint is damaged.
        FullDiskError: The disk is full; earlier checkpoints are kept.

    Of several processes, one that fails alone ends all of them (`peers.failing_together`).
    """
    full_disk = partial(full_disk_reported, folder)
    with (
        full_disk(),
        lock_workdir(folder),
        jax.set_mesh(mesh),
        failing_together() as peers,
        full_disk(),
        ExitStack() as stack,
    ):
        run = _Run(task, config, folder, mesh, stack)
        # Others are told before the checkpoints are closed, which can wait for them.
        with peers.told() if peers else nullcontext(), full_disk():
            if run.step < task.num_steps:
                run.run()
        return run.trainer.model(run.state.eval_params)


@contextmanager
def lock_workdir(folder: Path) -> Iterator[None]:
    """Locks a folder for one run at a time; the first process of a run holds the lock for all of them.

    Raises:
        ConfigError: Another run has locked the folder, or the first process cannot use it; raised in every
            process.
        OSError: The folder cannot be created or written to; raised in the first process.
    """
    error: Exception | None = None
    with ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                stack.enter_context(lock_folder(folder))
            except (ConfigError, OSError) as refused:
                error = refused
        if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.array(error is not None)):
            error = error or ConfigError(f"{folder}: cannot be used, as the first process reports")
        if error is not None:
            raise error
        yield


class _Run:
    """The state of one call of `train`."""

    def __init__(self, task: TrainingTask, config: LoopConfig, folder: Path, mesh: Mesh, stack: ExitStack):
        self.task, self.config, self.folder, self.mesh = task, config, folder, mesh
        process_rows(task.batch_size // task.optimizer.grad_accum_steps, mesh)  # raises if it does not divide
        self.rows = process_rows(task.batch_size, mesh)
        self.trainer = Trainer(
            task.model,
            task.loss,
            task.optimizer,
            task.num_steps,
            seed=config.seed,
            mesh=mesh,
            rules=task.parameters,
        )
        self.checkpoints = Checkpoints(
            checkpoint_folder(folder),
            task.settings,
            task.num_steps,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
        )
        stack.callback(self.checkpoints.close)
        self.state = self.checkpoints.restore(self.trainer.init_state())
        self.step = int(self.state.step)
        self.clock = _Clock(self.step)
        self.save_seconds: float | None = None

    def run(self) -> None:
        """Trains to the last step, or until a signal."""
        is_first = jax.process_index() == 0
        bar = tqdm(
            total=self.task.num_steps,
            initial=self.step,
            desc=self.task.name,
            unit="step",
            smoothing=0.05,
            disable=not is_first,
            postfix="compiling",
        )
        events = Events(self.folder if is_first else None)
        with _stop_signals() as signals, events, bar, closing(self._batches()) as batches:
            previous, compiled = None, set()
            for local in batches:
                records = _pop_names(local)
                metrics = self._dispatch(local)
                shapes = tuple((name, x.shape) for name, x in local.items())
                del local  # shared memory that workers have allocated
                if shapes not in compiled:  # includes compilation: not timed
                    compiled.add(shapes)
                    jax.block_until_ready(metrics)
                    bar.unpause()
                    self.clock.reset(self.step)
                if previous is not None:  # while this step runs
                    self._check(*previous)
                self.step += 1
                previous = (metrics, records)
                bar.update()
                last = self.step == self.task.num_steps
                if self.step % self.config.log_every == 0 or last:
                    self._check(*previous)
                    self._log(metrics, events, bar)
                evaluations = self._due_evaluations(last)
                stopping = self._should_stop(signals)
                # Evaluations may be long: a signal that arrives during one must find everything saved.
                if self.step % self.config.save_every == 0 or last or evaluations or stopping:
                    self._check(*previous)
                    self._save_and_time(events)
                if evaluations and not stopping:
                    for evaluate in evaluations:
                        evaluate(events)
                    self.clock.reset(self.step)
                    stopping = self._should_stop(signals)
                if stopping:
                    self._stop(signals)
                if last:
                    break

    def _batches(self) -> Iterator[Batch]:
        return self.task.batches(
            batch_size=self.task.batch_size,
            start=self.step,
            num_workers=self.config.num_workers,
            seed=self.config.seed,
            rows=self.rows.tolist(),
        )

    def _dispatch(self, local: Batch) -> Metrics:
        """Dispatches a step on the examples of this process, and returns its metrics without waiting."""
        batch = make_global_batch(local, self.rows, self.task.batch_size, self.mesh)
        step = jax.device_put(np.int32(self.step), NamedSharding(self.mesh, PartitionSpec()))
        self.state, metrics = self.trainer.step(self.state, self.trainer.frozen_state, batch, step)
        return metrics

    def _check(self, metrics: Metrics, records: str) -> None:
        """Ends the run if a step was not finite; that step and all after it have left the state unchanged."""
        if bool(metrics["finite"]):
            return
        self.step = int(self.state.step)
        self._save()
        of_records = f" ({records})" if records else ""
        raise FloatingPointError(
            f"{self.task.name}: step {self.step + 1}{of_records} is not finite "
            f"(loss {float(metrics['loss'])}); step {self.step} is saved in {self.checkpoints.folder}; "
            "inspect the records, or lower the learning rate"
        )

    def _should_stop(self, signals: list[int]) -> bool:
        """Whether to stop after this step.

        Any of several processes may receive the signal, and all must save the same step: JAX shares the
        signal between them, and agrees on a step that none of them has reached.
        """
        if jax.process_count() == 1:
            return bool(signals)
        return multihost_utils.reached_preemption_sync_point(self.step)

    def _stop(self, signals: list[int]) -> None:
        self.checkpoints.wait()
        raise Stopped(
            f"{self.task.name}: stopped and saved at step {self.step} of {self.task.num_steps}; run the same "
            "command to resume",
            signals[0] if signals else signal.SIGTERM,
        )

    def _log(self, metrics: Metrics, events: Events, bar: tqdm) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items() if name != "finite"}
        values["seconds_per_step"] = self.clock.per_step(self.step)
        events.scalars({f"{self.task.name}/{name}": value for name, value in values.items()}, self.step)
        bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['seconds_per_step']:.2f} s/step")

    def _save(self) -> None:
        self.checkpoints.save(self.state, {"step": self.step, "examples": self.step * self.task.batch_size})

    def _save_and_time(self, events: Events) -> None:
        """Saves; times and verifies the first save of a run, and warns if it takes too long."""
        step_seconds, start, grace = (
            self.clock.per_step(self.step),
            time.perf_counter(),
            self.config.grace_seconds,
        )
        self._save()
        if self.save_seconds is not None:
            return
        self.checkpoints.wait()
        self.save_seconds = time.perf_counter() - start
        self.checkpoints.verify()  # once a run: storage that does not keep what is written
        self.clock.reset(self.step)
        events.scalars({f"{self.task.name}/save_seconds": self.save_seconds}, self.step)
        if 2 * (step_seconds + self.save_seconds) > grace:
            logging.getLogger(__name__).warning(
                "%s: a step takes %.1f s and a save %.1f s; after SIGTERM two of each may take more than "
                "grace_seconds (%g); have the signal sent earlier and raise train.loop.grace_seconds, or "
                "save to faster storage",
                self.task.name,
                step_seconds,
                self.save_seconds,
                grace,
            )

    def _due_evaluations(self, last: bool) -> list[Callable[[Events], None]]:
        """Validation and sampling, each if it is due at this step."""
        task, config = self.task, self.config
        evaluations = (
            (task.validate, config.validate_every, self._validate),
            (task.sample, config.sample_every, self._sample),
        )
        return [
            run for given, every, run in evaluations if given and every and (last or self.step % every == 0)
        ]

    def _validate(self, events: Events) -> None:
        metrics = self.task.validate(self.trainer.model(self.state.eval_params))
        name = f"{self.task.name}/validation"
        events.scalars({f"{name}/{key}": value for key, value in metrics.items()}, self.step)

    def _sample(self, events: Events) -> None:
        with_videos = self.config.sample_videos and jax.process_index() == 0
        folder = self.folder / f"samples/{self.step:06d}" if with_videos else None
        images = self.task.sample(self.trainer.model(self.state.eval_params), folder)
        events.images({f"{self.task.name}/{name}": image for name, image in images.items()}, self.step)


def _pop_names(batch: Batch) -> str:
    """Removes what names the records of a batch, and returns it for messages; datasets count from 1."""
    records, datasets = (np.array(batch.pop(name, ()), int) for name in ("record", "dataset"))
    of_dataset = "".join(f" of dataset {number + 1}" for number in datasets[:1])
    return f"records {', '.join(map(str, records))}{of_dataset}" if len(records) else ""


class _Clock:
    """Seconds per step since the last reading."""

    def __init__(self, step: int):
        self.latest = 0.0
        self.reset(step)

    def reset(self, step: int) -> None:
        self.start, self.start_step = time.perf_counter(), step

    def per_step(self, step: int) -> float:
        if step > self.start_step:
            self.latest = (time.perf_counter() - self.start) / (step - self.start_step)
            self.reset(step)
        return self.latest


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Yields a list to which SIGINT and SIGTERM are appended instead of interrupting a step.

    With several processes JAX handles SIGTERM, and SIGINT is forwarded as SIGTERM.
    """
    received: list[int] = []
    several = jax.process_count() > 1

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    handled = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, receive) for number in handled]
    try:
        yield received
    finally:
        for number, handler in zip(handled, before, strict=True):
            signal.signal(number, handler)
