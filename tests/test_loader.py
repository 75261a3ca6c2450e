"""The data loader: batches depend on the step only, not on where a run starts or how many processes read."""

import itertools

import numpy as np
import pytest

from fantasy_jax.data.loader import batches


class Numbers:
    """Records that hold their own index."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"number": np.int64(index)}


def jitter(record, rng):
    return record | {"random": rng.uniform()}


def read(start, count, *, num_workers=0, seed=3, source=None):
    loader = batches(
        [source or Numbers()], jitter, batch_size=4, start=start, num_workers=num_workers, seed=seed
    )
    return [next(loader) for _ in range(count)]


def equal(one, other):
    return all(
        np.array_equal(a[name], b[name])
        for a, b in zip(one, other, strict=True)
        for name in ("number", "random")
    )


def test_batches_do_not_depend_on_start():
    assert equal(read(5, 3), read(0, 8)[5:])


@pytest.mark.slow
def test_batches_do_not_depend_on_the_number_of_workers():
    expected = read(0, 8)
    assert equal(read(0, 8, num_workers=1), expected)
    assert equal(read(0, 8, num_workers=2), expected)
    assert equal(read(3, 5, num_workers=2), expected[3:])


def test_every_epoch_has_every_record_once():
    numbers = np.concatenate([batch["number"] for batch in read(0, 10)])
    for epoch in numbers[:40].reshape(4, 10):
        assert sorted(epoch) == list(range(10))
    assert not np.array_equal(numbers[:10], numbers[10:20])


def test_processes_read_their_rows_only():
    expected = read(2, 3)
    for rows in ([0, 1], [3], [0, 2, 3]):
        parts = batches([Numbers()], jitter, batch_size=4, start=2, num_workers=0, seed=3, rows=rows)
        for batch in expected:
            part = next(parts)
            assert all(np.array_equal(part[name], batch[name][rows]) for name in batch)


class Letters(Numbers):
    """Records of another size."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"number": np.full(2, index)}


def read_both(start, count, shares=(), *, rows=None, num_workers=0):
    loader = batches(
        [Numbers(), Letters()],
        jitter,
        batch_size=4,
        start=start,
        num_workers=num_workers,
        seed=3,
        shares=shares,
        rows=rows,
    )
    return [next(loader) for _ in range(count)]


def datasets(found):
    """The dataset of each batch, which is the same for all of its examples."""
    for batch in found:
        assert batch["number"].shape == ((4,) if batch["dataset"][0] == 0 else (4, 2))
        assert len(set(batch["dataset"])) == 1
    return [int(batch["dataset"][0]) for batch in found]


def test_a_batch_is_of_one_dataset_with_the_shares_that_are_asked_for():
    found = read_both(0, 16, (3.0, 1.0))
    assert datasets(found) == [0, 0, 0, 1] * 4
    assert sum(datasets(read_both(0, 16))) == 6  # 6 of 16 records
    numbers = np.concatenate([batch["number"][:, 0] for batch in found if batch["dataset"][0]])
    assert sorted(numbers[:6]) == sorted(numbers[6:12]) == list(range(6))


@pytest.mark.parametrize(
    "options",
    [
        {"start": 5},
        {"start": 2, "rows": [1, 3]},
        pytest.param({"start": 3, "rows": [0, 2], "num_workers": 2}, marks=pytest.mark.slow),
    ],
)
def test_mixed_batches_do_not_depend_on_start_processes_or_workers(options):
    expected = read_both(0, 9, (2.0, 1.0))[options["start"] :]
    rows = options.get("rows", slice(None))
    for batch, other in zip(
        expected, read_both(count=len(expected), shares=(2.0, 1.0), **options), strict=True
    ):
        assert batch.keys() == other.keys()
        assert all(np.array_equal(other[name], batch[name][rows]) for name in batch)


class Damaged(Numbers):
    """Some of these records cannot be read."""

    def __getitem__(self, index):
        if index in (3, 4, 7):
            raise OSError(f"record {index} cannot be read (checksum)")
        return super().__getitem__(index)


def test_unreadable_records_are_logged_and_skipped(caplog):
    indices = np.concatenate([batch["record"] for batch in read(0, 10, source=Damaged())])
    assert set(indices) == {0, 1, 2, 5, 6, 8, 9}
    logged = {record.message for record in caplog.records if record.name == "fantasy_jax.data.records"}
    assert len(logged) == 3
    assert any("record 7" in message and "checksum" in message for message in logged)
    again = np.concatenate([batch["record"] for batch in read(0, 10, source=Damaged())])
    assert np.array_equal(again, indices)


def test_too_many_unreadable_records_are_an_error():
    damaged = batches([Damaged()], jitter, batch_size=4, start=0, num_workers=0, seed=3, max_unreadable=2)
    with pytest.raises(OSError, match="record"):
        list(itertools.islice(damaged, 10))


def test_another_seed_gives_another_order():
    assert not equal(read(0, 3), read(0, 3, seed=4))
