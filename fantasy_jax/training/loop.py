"""The loop: batches in, steps, a bar, logs, checkpoints, and a stop that loses nothing."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tensorboardX import SummaryWriter
from tqdm import tqdm

from fantasy_jax.cli import Stopped
from fantasy_jax.config import ConfigError
from fantasy_jax.training.checkpoint import Checkpoints
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.state import Batch, Loss, Trainer, TrainState
from fantasy_jax.typing import UInt8


@dataclass(frozen=True)
class LoopConfig:
    """What a run does beside its steps.

    Attributes:
        log_every: Steps between two looks at the loss.
        save_every: Steps between two checkpoints.
        show_every: Steps between two sample pictures; 0 for none.
        workers: Processes that read and prepare batches; 0 reads in the run's own.
        seed: Of initial weights, data order, noise and dropout.
    """

    log_every: int = 20
    save_every: int = 500
    show_every: int = 500
    workers: int = 1
    seed: int = 0

    def __post_init__(self):
        for name in ("log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.show_every < 0 or self.workers < 0:
            raise ConfigError("show_every and workers must not be negative")


@dataclass(frozen=True)
class Task:
    """A thing to train.

    Attributes:
        name: Of the stage.
        model: Where it starts.
        loss: What is lowered.
        batches: Gives the batches from step `start` on; which they are depends on the step alone.
        batch_size: Examples in each.
        steps: How long.
        optimizer: How.
        show: Makes pictures of what the model can do by now.
        settings: Everything that decides the result, JSON's types; a run goes on only with the same.
    """

    name: str
    model: nnx.Module
    loss: Loss
    batches: Callable[..., Iterator[Batch]]
    batch_size: int
    steps: int
    optimizer: OptimizerConfig
    show: Callable[[nnx.Module], dict[str, UInt8[np.ndarray, "H W 3"]]] = lambda model: {}
    settings: dict[str, Any] = field(default_factory=dict)


def train(task: Task, config: LoopConfig, folder: Path) -> nnx.Module:
    """Trains until the task's last step, or from where an earlier call stopped.

    Args:
        task: What.
        config: What is done on the way.
        folder: For checkpoints and TensorBoard's files.

    Returns:
        The model with the running mean of its parameters.

    Raises:
        Stopped: SIGINT or SIGTERM came; everything is saved.
        FloatingPointError: The loss is no number any more.
        ConfigError: The folder holds a run with other settings.
    """
    trainer = Trainer(task.model, task.loss, task.optimizer, task.steps, seed=config.seed)
    checkpoints = Checkpoints(folder / "checkpoints", task.settings)
    state = trainer.initial()
    state = checkpoints.restore(state) or state
    try:
        if int(state.step) < task.steps:
            state = _run(task, config, folder, trainer, checkpoints, state)
    finally:
        checkpoints.close()
    return trainer.model(state.average)


def _run(
    task: Task,
    config: LoopConfig,
    folder: Path,
    trainer: Trainer,
    checkpoints: Checkpoints,
    state: TrainState,
) -> TrainState:
    first = int(state.step)

    def save(state: TrainState) -> None:
        step = int(state.step)
        checkpoints.save(state, {"step": step, "examples": step * task.batch_size})

    bar = tqdm(total=task.steps, initial=first, desc=task.name, unit="step", smoothing=0.05)
    with _stop_signals() as stop, SummaryWriter(str(folder), flush_secs=20) as writer, bar:
        bar.set_postfix_str("compiling")
        batches, begun, seen = task.batches(start=first), time.perf_counter(), first
        for step in range(first + 1, task.steps + 1):
            state, metrics = trainer.step(state, trainer.rest, next(batches))
            if step == first + 1:  # which no later step takes as long as
                jax.block_until_ready(metrics)
                bar.unpause()
                begun, seen = time.perf_counter(), first
            if step % config.log_every == 0 or step == task.steps:
                numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
                if not np.isfinite(numbers["loss"]):
                    raise FloatingPointError(
                        f"{task.name}: the loss is {numbers['loss']} at step {step}; the newest checkpoint "
                        f"in {checkpoints.folder} is sound; lower the learning rate"
                    )
                numbers["seconds_per_step"] = (time.perf_counter() - begun) / (step - seen)
                begun, seen = time.perf_counter(), step
                for name, value in numbers.items():
                    writer.add_scalar(f"{task.name}/{name}", value, step)
                bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {numbers['seconds_per_step']:.2f} s a step")
            bar.update()
            if step % config.save_every == 0 or step == task.steps or stop:
                save(state)
            if stop:
                raise Stopped(
                    f"{task.name}: stopped and saved at step {step} of {task.steps}; "
                    "the same command goes on from there",
                    stop[0],
                )
            if config.show_every and (step % config.show_every == 0 or step == task.steps):
                for name, picture in task.show(trainer.model(state.average)).items():
                    writer.add_image(f"{task.name}/{name}", picture, step, dataformats="HWC")
                begun, seen = time.perf_counter(), step
    return state


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM are put in, instead of ending the process in the middle of a step."""
    received: list[int] = []
    wanted = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: received.append(number)) for number in wanted]
    try:
        yield received
    finally:
        for number, handler in zip(wanted, before, strict=True):
            signal.signal(number, handler)
