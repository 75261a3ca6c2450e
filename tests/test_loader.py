"""Batches are a function of the step: not of where a run begins, nor of how many processes read."""

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


def test_another_seed_gives_another_order():
    assert not equal(read(0, 3), read(0, 3, seed=4))
