"""Previews of a clip in files, while it is sampled."""

import logging
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from tqdm import tqdm

from fantasy_jax.errors import FantasyError
from fantasy_jax.pipelines.base import StepProgress

_USUAL_SHARE = 6
"""A preview is made after each of so many parts of the steps."""


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
        every = self.every or -(-progress.num_steps // _USUAL_SHARE)
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
        """An mp4 and a PNG of one name that do not exist: `name`, `name_2`, ..."""
        names = chain([name], (f"{name}_{number}" for number in count(2)))
        pairs = ((self.folder / f"{x}.mp4", self.folder / f"{x}.png") for x in names)
        return next(pair for pair in pairs if not any(path.exists() for path in pair))
