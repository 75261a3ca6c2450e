"""Checkpoints of a run, written asynchronously by Orbax and moved into place when complete."""

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from fantasy_jax.config import as_json
from fantasy_jax.errors import ConfigError
from fantasy_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one run, by step."""

    def __init__(self, folder: Path, settings: dict, *, keep_last: int, keep_every: int):
        """Opens a folder, or creates it.

        Args:
            folder: Folder of this run only.
            settings: Settings that a run must share to resume from these checkpoints.
            keep_last: Number of newest checkpoints that are kept.
            keep_every: Checkpoints whose step is a multiple of this are kept too; 0 for none.
        """
        logging.getLogger("absl").setLevel(logging.WARNING)
        self.folder, self.settings = Path(folder).absolute(), as_json(settings)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, keep_period=keep_every or None, enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState, position: dict[str, int]) -> None:
        """Saves a state unless its step is saved already.

        Args:
            state: The state.
            position: Position of the run in its data, kept for readers of the checkpoint.
        """
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        about = {"settings": self.settings, "position": position}
        self.manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)),
        )

    def restore(self, initial: TrainState) -> TrainState:
        """Returns the newest state, sharded as `initial` is, or `initial` itself if there is no checkpoint.

        Raises:
            ConfigError: The checkpoint was written with other settings.
        """
        step = self.manager.latest_step()
        if step is None:
            return initial
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, initial)
        about = self.manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        if differing := [k for k, v in self.settings.items() if about["settings"].get(k) != v]:
            raise ConfigError(
                f"{self.folder}: was started with other settings ({differing[0]}); keep them, or choose "
                "another workdir"
            )
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self.manager.restore(step, args=arguments)["state"]

    def wait(self) -> None:
        """Waits until pending writes are complete."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending writes and closes the manager."""
        self.manager.close()
