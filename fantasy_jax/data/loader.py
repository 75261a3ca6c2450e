"""The data loader: batches of records by Grain, in an order that is a function of the step."""

import ctypes
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags

from fantasy_jax.data.records import MAX_UNREADABLE, ReadableRecords, Record
from fantasy_jax.processes import init_worker, signals_blocked


def batches(
    sources: Sequence[Any],
    transform: Callable[[Record, np.random.Generator], Record],
    *,
    batch_size: int,
    start: int,
    num_workers: int,
    seed: int,
    shares: Sequence[float] = (),
    rows: Sequence[int] | None = None,
    max_unreadable: int = MAX_UNREADABLE,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches without end, from batch number `start` on; closing the iterator ends its workers.

    A batch is of one dataset, since records of different datasets can differ in size. Which one, the records
    and the random numbers of a batch depend on `seed` and on the number of the batch only, not on the number
    of workers or processes or on `start`.

    Args:
        sources: Datasets: sequences of records, such as TFDS' `as_data_source`; they must pickle.
        transform: Makes an example of a record, with a random generator for augmentation; it must pickle.
        batch_size: Examples in a batch of all processes.
        start: Number of the first batch.
        num_workers: Worker processes; 0 reads in threads of this process.
        seed: Seed of the order and of the random generators.
        shares: Share of the batches that each dataset has, up to a common factor; none: its share of records.
        rows: Which examples of each batch this process needs; None for all.
        max_unreadable: Number of unreadable records that are replaced by the next ones (`ReadableRecords`);
            with one more in one process an OSError ends the run.

    Yields:
        Arrays by name, and the indices of the records as `record`, in the dataset `dataset`, both `[B]`.
    """
    rows = range(batch_size) if rows is None else rows

    def batched(number: int, source: Any) -> grain.MapDataset:
        readable = ReadableRecords(source, max_unreadable)
        dataset = grain.MapDataset.source(readable).seed(seed).shuffle().repeat()
        dataset = _Rows(dataset.random_map(_Transform(transform, number)), batch_size, tuple(rows))
        return dataset.batch(len(rows), drop_remainder=True)

    datasets = [batched(number, source) for number, source in enumerate(sources)]
    dataset = grain.MapDataset.mix(datasets, [float(x) for x in shares or map(len, sources)])
    # The length of an endless dataset is sys.maxsize: a slice of it is as good as endless.
    dataset = dataset.slice(slice(start, None)) if start else dataset
    iterable = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads a flag of its own (google/grain, issue 1355)
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=4)
        iterable = iterable.mp_prefetch(options, worker_init_fn=_init_worker)
    iterator = iter(iterable)
    try:
        with signals_blocked():  # the first batch starts the workers
            first = [next(iterator)]
        yield first.pop()  # no reference is left: the shared memory of a batch is freed with its arrays
        yield from iterator
    finally:
        iterator.close()


@dataclass(frozen=True)
class _Transform:
    """Transforms the record of a pair and adds its index and the number of its dataset."""

    transform: Callable[[Record, np.random.Generator], Record]
    dataset: int

    def __call__(self, indexed: tuple[int, Record], rng: np.random.Generator) -> Record:
        index, record = indexed
        return self.transform(record, rng) | {"record": np.int64(index), "dataset": np.int64(self.dataset)}


class _Rows(grain.MapDataset):
    """The given rows of every batch; other examples are never read."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: tuple[int, ...]):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[row]]


_MALLOC = {-1: 2**30, -3: 2**25, -8: 1}
"""M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (its maximum) and M_ARENA_MAX of glibc's malloc.h."""


def _init_worker(worker: int, num_workers: int) -> None:
    """Sets up a worker process."""
    init_worker()
    # Keeps the memory of one record for the next: returning it and allocating it again, page by page, would
    # take longer than reading.
    if platform.libc_ver()[0] == "glibc":
        for parameter, value in _MALLOC.items():
            ctypes.CDLL(None).mallopt(parameter, value)
