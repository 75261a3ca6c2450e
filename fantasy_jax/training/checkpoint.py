"""Checkpoints: the state of a run by step, written by Orbax, complete or not there."""

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from fantasy_jax.config import ConfigError, as_json
from fantasy_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one run, written beside the steps and moved into place when they are complete."""

    def __init__(self, folder: Path, settings: dict, *, keep_last: int, keep_every: int):
        """Opens a folder, or makes it.

        Args:
            folder: Of this run alone.
            settings: That a run must have to go on from here.
            keep_last: How many of the newest are kept.
            keep_every: Those whose step is a multiple of this are kept, too; 0 for none.
        """
        logging.getLogger("absl").setLevel(logging.WARNING)
        self.folder, self.settings = Path(folder).absolute(), as_json(settings)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, keep_period=keep_every or None, enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState, position: dict[str, int]) -> None:
        """Saves, unless this step is saved; `position` says in words where in the data the run stands."""
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        about = {"settings": self.settings, "position": position}
        self.manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)),
        )

    def restore(self, start: TrainState) -> TrainState:
        """The newest state, cut as `start` is; `start` itself where there is none.

        Raises:
            ConfigError: It was made with other settings.
        """
        step = self.manager.latest_step()
        if step is None:
            return start
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, start)
        about = self.manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        if differing := [k for k, v in self.settings.items() if about["settings"].get(k) != v]:
            raise ConfigError(
                f"{self.folder}: was begun with another {differing[0]}; keep it, or choose another workdir"
            )
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self.manager.restore(step, args=arguments)["state"]

    def wait(self) -> None:
        """Waits until what is being written is complete."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written."""
        self.manager.close()
