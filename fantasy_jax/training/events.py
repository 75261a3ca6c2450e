"""What a run tells TensorBoard, written when it is told.

`SummaryWriter` has a thread that writes, and may be behind a checkpoint that is on disk.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from fantasy_jax.typing import UInt8


class Events:
    """A file of a run's numbers and pictures; on disk when a method returns."""

    def __init__(self, folder: Path | None):
        """Begins a file in a folder; None tells nobody, for all processes but the first."""
        self._writer = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Tells numbers, by name."""
        self._write((summary.scalar(name, value) for name, value in values.items()), step)

    def pictures(self, values: Mapping[str, UInt8[np.ndarray, "H W 3"]], step: int) -> None:
        """Tells pictures, by name."""
        made = (summary.image(name, picture, dataformats="HWC") for name, picture in values.items())
        self._write(made, step)

    def _write(self, parts: Iterator[Summary], step: int) -> None:
        if self._writer is None:
            return
        whole = Summary(value=[value for part in parts for value in part.value])
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=whole))
        self._writer.flush()
