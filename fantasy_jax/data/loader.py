"""The loader: records to batches by Grain, in an order that is a function of the step."""

import ctypes
import logging
import platform
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags

from fantasy_jax.data.records import Record


def batches(
    source: Any,
    prepare: Callable[[Record, np.random.Generator], Record],
    *,
    batch_size: int,
    start: int,
    workers: int,
    seed: int,
    rows: Sequence[int] | None = None,
    max_unreadable: int = 10,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches, from a step on.

    Which records a batch holds and what chance does to them depends on `seed` and on the batch's number
    alone, not on the number of workers or processes or on where the run began.

    Args:
        source: Records that can be indexed, such as TFDS' `as_data_source` gives; it must pickle.
        prepare: Makes an example of a record, by chance as it likes; it must pickle.
        batch_size: Examples in a batch.
        start: Number of the first batch that is wanted.
        workers: Processes to read with; 0 reads in threads of this one.
        seed: Of order and chance.
        rows: Which examples of each batch are wanted, where several processes share it; None: all.
        max_unreadable: So many records that cannot be read are named in the log, and the next ones taken in
            their place; one more in one process ends the run.

    Yields:
        Arrays by name, and the records' numbers as `record`.
    """
    dataset = grain.MapDataset.source(_Readable(source, max_unreadable)).seed(seed).shuffle().repeat()
    dataset = dataset.random_map(_Numbered(prepare))
    if rows is not None:
        dataset = _Rows(dataset, batch_size, tuple(rows))
    dataset = dataset.batch(batch_size if rows is None else len(rows), drop_remainder=True)
    # A slice of an endless dataset ends where Python's integers for lengths do.
    dataset = dataset.slice(slice(start, None)) if start else dataset
    iterable = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads a flag of its own (google/grain, issue 1355)
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=4)
        iterable = iterable.mp_prefetch(options, worker_init_fn=_begin_worker)
    return iter(iterable)


class _Readable:
    """Records with their numbers, those that cannot be read left out."""

    def __init__(self, source: Any, limit: int):
        self._source, self._limit = source, limit
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, Record]:
        while True:
            try:
                return index, self._source[index]
            except Exception as error:  # damaged files make readers raise anything
                self._unreadable.add(index)
                message = f"record {index} cannot be read ({type(error).__name__}: {error})"
                if len(self._unreadable) > self._limit:
                    raise OSError(f"{message}; nor can {self._limit} others, remake the dataset") from error
                logging.getLogger(__name__).warning("%s; number %d, left out", message, len(self._unreadable))
                index = (index + 1) % len(self)


@dataclass(frozen=True)
class _Numbered:
    """Prepares a record and keeps its number."""

    prepare: Callable[[Record, np.random.Generator], Record]

    def __call__(self, numbered: tuple[int, Record], rng: np.random.Generator) -> Record:
        number, record = numbered
        return self.prepare(record, rng) | {"record": np.int64(number)}


class _Rows(grain.MapDataset):
    """Of every batch of examples, some; the others are never read."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: tuple[int, ...]):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, place = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[place]]


_MALLOC = {-1: 2**30, -3: 2**25, -8: 1}
"""M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (the largest that is allowed) and M_ARENA_MAX of glibc's malloc.h."""


def _begin_worker(worker: int, workers: int) -> None:
    """What is set in a process that reads."""
    # Ctrl-C reaches every process; the run decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Memory of one record is kept for the next: given back and asked for anew, page by page, it would take
    # longer than reading takes.
    if platform.libc_ver()[0] == "glibc":
        for parameter, value in _MALLOC.items():
            ctypes.CDLL(None).mallopt(parameter, value)
