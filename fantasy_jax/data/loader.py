"""The loader: records to batches by Grain, in an order that is a function of the step."""

import signal
from collections.abc import Callable, Iterator
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
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches, from a step on.

    Which records a batch holds and what chance does to them depends on `seed` and on the batch's number
    alone, not on the number of workers or on where the run began.

    Args:
        source: Records that can be indexed, such as TFDS' `as_data_source` gives; it must pickle.
        prepare: Makes an example of a record, by chance as it likes; it must pickle.
        batch_size: Examples in a batch.
        start: Number of the first batch that is wanted.
        workers: Processes to read with; 0 reads in threads of this one.
        seed: Of order and chance.
    """
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(prepare)
    dataset = dataset.batch(batch_size, drop_remainder=True)
    # A slice of an endless dataset ends where Python's integers for lengths do.
    dataset = dataset.slice(slice(start, None)) if start else dataset
    iterable = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads a flag of its own (google/grain, issue 1355)
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=4)
        iterable = iterable.mp_prefetch(options, worker_init_fn=_leave_interrupts_to_the_run)
    return iter(iterable)


def _leave_interrupts_to_the_run(worker: int, workers: int) -> None:
    """Ctrl-C reaches every process; the run decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
