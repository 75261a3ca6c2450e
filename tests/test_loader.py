"""Batches are a function of the step: not of where a run begins, nor of how many processes read."""

import itertools

import numpy as np
import pytest

from fantasy_jax.data.loader import batches


class Numbers:
    """Records that are their own number."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"number": np.int64(index)}


def jitter(record, rng):
    return record | {"chance": rng.uniform()}


def read(start, count, *, workers=0, seed=3, source=None):
    loader = batches(source or Numbers(), jitter, batch_size=4, start=start, workers=workers, seed=seed)
    return [next(loader) for _ in range(count)]


def equal(one, other):
    return all(
        np.array_equal(a[name], b[name])
        for a, b in zip(one, other, strict=True)
        for name in ("number", "chance")
    )


def test_a_later_start_gives_what_would_have_come():
    whole = read(0, 8)
    assert equal(read(5, 3), whole[5:])


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing():
    whole = read(0, 8)
    assert equal(read(0, 8, workers=1), whole)
    assert equal(read(0, 8, workers=2), whole)
    assert equal(read(3, 5, workers=2), whole[3:])


def test_every_record_comes_once_before_one_comes_twice():
    numbers = np.concatenate([batch["number"] for batch in read(0, 10)])
    for epoch in numbers[:40].reshape(4, 10):
        assert sorted(epoch) == list(range(10))
    assert not np.array_equal(numbers[:10], numbers[10:20])


def test_processes_read_the_rows_that_are_theirs():
    whole = read(2, 3)
    for rows in ([0, 1], [3], [0, 2, 3]):
        parts = batches(Numbers(), jitter, batch_size=4, start=2, workers=0, seed=3, rows=rows)
        for batch in whole:
            part = next(parts)
            assert all(np.array_equal(part[name], batch[name][rows]) for name in batch)


class Damaged(Numbers):
    """Some of these records cannot be read."""

    def __getitem__(self, index):
        if index in (3, 4, 7):
            raise ValueError("checksum")
        return super().__getitem__(index)


def test_records_that_cannot_be_read_are_named_and_left_out(caplog):
    seen = np.concatenate([batch["record"] for batch in read(0, 10, source=Damaged())])
    assert set(seen) == {0, 1, 2, 5, 6, 8, 9}
    assert "record 7 cannot be read (ValueError: checksum)" in caplog.text
    assert "number 3, left out" in caplog.text
    again = np.concatenate([batch["record"] for batch in read(0, 10, source=Damaged())])
    assert np.array_equal(again, seen)
    damaged = batches(Damaged(), jitter, batch_size=4, start=0, workers=0, seed=3, max_unreadable=2)
    with pytest.raises(OSError, match="nor can 2 others"):
        list(itertools.islice(damaged, 10))


def test_another_seed_gives_another_order():
    assert not equal(read(0, 3), read(0, 3, seed=4))
