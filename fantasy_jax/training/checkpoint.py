"""Checkpoints of a run, written asynchronously by Orbax and moved into place when complete."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from fantasy_jax.config import as_json, differences
from fantasy_jax.errors import ConfigError
from fantasy_jax.training.checksums import find_damage, write_checksums, write_checksums_of_process
from fantasy_jax.training.state import TrainState

_log = logging.getLogger(__name__)
_DAMAGED = ".damaged"
_MESSAGE_BYTES = 256


class Checkpoints:
    """The checkpoints of one run, by step."""

    def __init__(self, folder: Path, settings: dict, num_steps: int, *, keep_last: int, keep_every: int):
        """Opens a folder, or creates it.

        Args:
            folder: Folder of this run only.
            settings: Settings that a run must share to resume from these checkpoints, by their config names.
            num_steps: Length of the run.
            keep_last: Number of newest checkpoints that are kept.
            keep_every: Checkpoints whose step is a multiple of this are kept too; 0 for none.
        """
        _quieten_orbax()
        self.folder, self.settings, self.num_steps = Path(folder).absolute(), as_json(settings), num_steps
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last,
            keep_period=keep_every or None,
            enable_async_checkpointing=True,
            async_options=ocp.options.AsyncOptions(
                barrier_sync_fn=self._barrier, post_finalization_callback=self._write_checksums
            ),
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState, position: dict[str, int]) -> None:
        """Saves a state unless its step is saved already; errors of writing are raised by later calls.

        Args:
            state: The state.
            position: Position of the run in its data, kept for readers of the checkpoint.
        """
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        about = {"settings": self.settings, "position": position, "num_steps": self.num_steps}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        self.manager.save(step, args=arguments)

    def restore(self, initial: TrainState) -> TrainState:
        """Returns the newest state, sharded as `initial` is, or `initial` itself if there is no checkpoint.

        Checkpoints whose files do not match their checksums are put aside: `100` becomes `100.damaged`.

        Raises:
            ConfigError: The checkpoint was written with other settings, or all checkpoints are damaged.
        """
        step = self._newest_intact()
        if step is None:
            return initial
        about = _read_about(self.folder / str(step))
        _check(self.folder, about["settings"], self.settings)
        if about["num_steps"] != self.num_steps:
            follows = "the learning rate follows the schedule of the new length from here on"
            _log.warning(
                "%s: num_steps was %d and is now %d; %d steps are done, %s",
                self.folder,
                about["num_steps"],
                self.num_steps,
                step,
                follows if step < self.num_steps else "nothing is left to train",
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, initial)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self.manager.restore(step, args=arguments)["state"]

    def _newest_intact(self) -> int | None:
        """Returns the newest step without damage, after putting aside newer ones; None if there is no step.

        Raises:
            ConfigError: There are checkpoints, and all are damaged.
        """
        latest = self.manager.latest_step()
        for step in sorted(self.manager.all_steps(), reverse=True):
            damage = self._damage(step)
            if damage is None:
                if step != latest:
                    _log.warning("%s: resumes from step %d", self.folder, step)
                return step
            self._put_aside(self.folder / str(step), damage)
        if left := sorted(path.name for path in self.folder.glob(f"*{_DAMAGED}*")):
            raise ConfigError(
                f"{self.folder}: no checkpoint is intact ({', '.join(left)}); restore one from a copy, or "
                "remove the folder to start again"
            )
        return None

    def verify(self) -> None:
        """Verifies the newest checkpoint.

        Raises:
            OSError: It is damaged.
        """
        step = self.manager.latest_step()
        if damage := self._damage(step):
            raise OSError(f"{self.folder / str(step)}: {damage}, although just written; check the storage")

    def _damage(self, step: int) -> str | None:
        folder = self.folder / str(step)
        return _of_any_process(find_damage(folder, jax.process_index(), jax.process_count()))

    def _put_aside(self, folder: Path, damage: str) -> None:
        """Renames a damaged checkpoint, so that it is not used, and not deleted either."""
        aside = folder.with_name(folder.name + _DAMAGED)
        number = 1
        while aside.exists():
            number += 1
            aside = folder.with_name(f"{folder.name}{_DAMAGED}{number}")
        if jax.process_count() > 1:  # all have found a name that is free
            multihost_utils.sync_global_devices(f"damaged {folder}")
        if jax.process_index() == 0:
            folder.rename(aside)
            _log.warning("%s: %s; this checkpoint is put aside as %s", folder, damage, aside.name)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"put aside {folder}")
        self.manager.reload()

    def wait(self) -> None:
        """Waits until pending writes are complete."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending writes and closes the manager."""
        self.manager.close()

    def _barrier(self, key: str, timeout_ms: int) -> None:
        """Synchronises the processes of a save; only several processes call it.

        Raises:
            Exception: The save has failed in this process, where Orbax would still wait for the others.
        """
        if (error := sys.exception()) is not None:
            raise error
        if "async_write_complete" in key:
            write_checksums_of_process(self._pending(), jax.process_index())
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _write_checksums(self) -> None:
        """Completes a checkpoint before its folder gets its name; only the first process calls it."""
        # Orbax writes its metadata in a thread of its own, and waits for it only after this call.
        self.manager._non_blocking_metadata_store.wait_until_finished()
        folder = self._pending()
        write_checksums(folder, self.folder / folder.name.partition(".")[0])

    def _pending(self) -> Path:
        """The folder of the checkpoint that is being written; there is one at a time."""
        (folder,) = self.folder.glob("*.orbax-checkpoint-tmp*")
        return folder


def check_resumable(folder: Path, settings: dict) -> None:
    """Checks the settings of the newest checkpoint in a folder, before any work.

    Args:
        folder: Folder of a run's checkpoints, which need not exist.
        settings: Settings that decide the result.

    Raises:
        ConfigError: The run was started with other settings.
    """
    steps = (path for path in folder.glob("*") if path.name.isdecimal())
    for path in sorted(steps, key=lambda path: int(path.name), reverse=True):
        if find_damage(path, item="about/") is None:  # other damage shows when the run is resumed
            _check(folder, _read_about(path)["settings"], as_json(settings))
            break


def _check(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name, one, other in differences(before, now):
        raise ConfigError(
            f"{name} was {one!r} when {folder} was begun, and is now {other!r}; keep it, or choose another "
            "workdir"
        )


def _read_about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "about/metadata").read_text())


def _of_any_process(message: str | None) -> str | None:
    """Returns the message of the first process that has one, the same in all processes."""
    if jax.process_count() == 1:
        return message
    encoded = (message or "").encode()[:_MESSAGE_BYTES]
    mine = np.frombuffer(encoded.ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
    messages = (bytes(row).rstrip(b"\0") for row in multihost_utils.process_allgather(mine))
    return next((text.decode(errors="replace") for text in messages if text), None)


def _quieten_orbax() -> None:
    """Hides Orbax's progress, and its tracebacks of errors that it raises again afterwards."""
    logger = logging.getLogger("absl")
    logger.setLevel(logging.WARNING)
    if _has_no_traceback not in logger.filters:
        logger.addFilter(_has_no_traceback)


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info
