"""Previews of a clip in files, while it is sampled."""

import logging
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tqdm import tqdm

from fantasy_jax.errors import FantasyError
from fantasy_jax.pipelines.base import StepProgress

_USUAL_COUNT = 6


@dataclass(frozen=True)
class PreviewFiles:
    """Writes what steps predict, without replacing any file; its call is a `callback_on_step_end`.

    A preview that cannot be written, such as on a full disk, is a warning.

    Attributes:
        folder: Where the files are: an mp4 without sound for each preview, and a contact sheet beside it.
        name: What their names begin with.
        every: Steps from one preview to the next; None: a sixth of all. The last step has none.
    """

    folder: Path
    name: str
    every: int | None = None

    def __call__(self, progress: StepProgress) -> None:
        """Writes a preview if the step has one."""
        every = self.every or -(-progress.num_steps // _USUAL_COUNT)
        if progress.step % every or progress.step == progress.num_steps:
            return
        video, sheet = self._free_paths(f"{self.name}_step_{progress.step:02}")
        try:
            progress.preview.save(video, sheet=sheet)
        except (FantasyError, OSError) as error:  # not worth the steps that are done
            logging.getLogger(__name__).warning("preview: %s", error)
        else:
            tqdm.write(f"Wrote {video}: preview after step {progress.step} of {progress.num_steps}")

    def _free_paths(self, name: str) -> tuple[Path, Path]:
        """An mp4 and a PNG of one name that do not exist: `NAME`, `NAME_2`, ..."""
        for number in count(1):
            path = self.folder / (name if number == 1 else f"{name}_{number}")
            paths = path.with_name(f"{path.name}.mp4"), path.with_name(f"{path.name}.png")
            if not any(path.exists() for path in paths):
                return paths
        raise AssertionError("unreachable")
