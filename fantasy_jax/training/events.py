"""TensorBoard event files, flushed after each write.

`SummaryWriter` writes in a thread, which may be behind a checkpoint that is already on disk.
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
    """An event file of scalars and images; what a method writes is on disk when it returns."""

    def __init__(self, folder: Path | None):
        """Opens a file in `folder`; None writes nothing, for all processes but the first."""
        self._writer = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Writes scalars by name."""
        self._write((summary.scalar(name, value) for name, value in values.items()), step)

    def images(self, values: Mapping[str, UInt8[np.ndarray, "H W 3"]], step: int) -> None:
        """Writes images by name."""
        self._write((summary.image(name, image, dataformats="HWC") for name, image in values.items()), step)

    def _write(self, parts: Iterator[Summary], step: int) -> None:
        if self._writer is None:
            return
        merged = Summary(value=[value for part in parts for value in part.value])
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=merged))
        self._writer.flush()
