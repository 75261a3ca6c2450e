"""Datasets on disk: written once, with metadata that later uses are checked against."""

import errno
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import damage_record

from fantasy_jax.data.records import (
    ReadableRecords,
    Records,
    check_metadata,
    open_split,
    read_metadata,
    write_dataset,
)
from fantasy_jax.disk import FullDiskError, full_disk_reported
from fantasy_jax.errors import ConfigError


@dataclass(frozen=True)
class Video:
    height: int = 64
    size: tuple[int, int] = (1, 2)


METADATA = {"video": Video(), "fps": 25}


def write(directory, metadata, count=3):
    return write_dataset(
        "numbers",
        directory,
        lambda: {"x": tfds.features.Tensor(shape=(2,), dtype=np.float32, encoding="bytes")},
        {"train": ({"x": np.full(2, i, np.float32)} for i in range(count))},
        metadata,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("datasets"), METADATA)


def test_records_and_metadata_come_back(folder):
    records = open_split(folder, "train")
    assert [record["x"][0] for record in records] == [0, 1, 2]
    assert read_metadata(folder) == {"video": {"height": 64, "size": [1, 2]}, "fps": 25}


def test_records_of_several_files_are_written_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr("fantasy_jax.data.records._SHARD_BYTES", 50)
    folder = write(tmp_path, METADATA, count=8)
    names = [file.name for file in sorted(folder.glob("*array_record*"))]
    assert names == [f"numbers-train.array_record-0000{i}-of-00003" for i in range(3)]
    assert [record["x"][0] for record in open_split(folder, "train")] == list(range(8))


def test_a_split_without_records_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no records for the split train"):
        write(tmp_path, METADATA, count=0)


def test_a_dataset_is_not_written_twice(folder):
    assert write(folder.parent.parent, METADATA, count=5) == folder
    assert len(open_split(folder, "train")) == 3
    with pytest.raises(ConfigError, match="fps"):
        write(folder.parent.parent, METADATA | {"fps": 24})


@pytest.mark.parametrize(
    "wanted", [METADATA, {}, {"video": {"height": 64}}, {"vae": 1, "video": {"width": 8}}]
)
def test_metadata_that_agree(folder, wanted):
    check_metadata(folder, wanted)


@pytest.mark.parametrize(
    ("wanted", "key", "values"),
    [
        ({"fps": 23}, "fps", ("25", "23")),
        ({"video": Video(height=32)}, "video.height", ("64", "32")),
        ({"video": Video(size=(2, 1))}, "video.size", ("[1, 2]", "[2, 1]")),
        ({"video": 3}, "video", ("64", "3")),
    ],
)
def test_config_error_names_key_and_both_values(folder, wanted, key, values):
    with pytest.raises(ConfigError) as caught:
        check_metadata(folder, wanted)
    assert all(part in str(caught.value) for part in (str(folder), f"{key} ", *values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "use",
    [read_metadata, lambda folder: check_metadata(folder, {}), lambda folder: open_split(folder, "train")],
)
def test_config_error_for_a_folder_without_a_dataset(use, tmp_path):
    with pytest.raises(ConfigError, match=tmp_path.name):
        use(tmp_path)


def damage(path, kind):
    if kind == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(
            {"empty": b"", "cut": content[: len(content) // 2], "other": b"\xff" + content}[kind]
        )


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "metadata.json"])
@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "other"])
def test_config_error_for_a_damaged_dataset(folder, tmp_path, name, kind):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy / name, kind)
    with pytest.raises(ConfigError) as caught:
        check_metadata(copy, METADATA)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_config_error_for_a_missing_shard_or_split(folder, tmp_path, kind):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (shard,) = copy.glob("*array_record*")
    with pytest.raises(ConfigError, match="test"):
        open_split(copy, "test")
    damage(shard, kind)
    with pytest.raises(ConfigError, match=shard.name):
        open_split(copy, "train")


def test_a_damaged_record_is_named_and_the_next_one_takes_its_place(folder, tmp_path, caplog):
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = [record["x"][0] for record in open_split(copy, "train")]
    index = before.index(2)
    damage_record(copy, "train", np.full(2, 2, np.float32).tobytes())
    records = open_split(copy, "train")
    assert records[index - 1]["x"][0] == before[index - 1]
    with pytest.raises(OSError, match=f"{copy}, train: record {index} cannot be read") as caught:
        list(records)
    assert "\n" not in str(caught.value)
    readable = ReadableRecords(records)
    others = [i for i in range(3) if i != index]
    assert [readable[i][0] for i in (*others, index, index)] == [*others, (index + 1) % 3, (index + 1) % 3]
    (told,) = caplog.messages
    assert f"record {index}" in told


def test_records_that_are_all_damaged_are_an_error():
    class Damaged(list):
        def __getitem__(self, index):
            raise OSError(f"record {index} cannot be read")

    with pytest.raises(OSError, match="2 others"):
        ReadableRecords(Damaged(range(3)))[0]
    with pytest.raises(OSError, match=r"^record 0 cannot be read$"):
        ReadableRecords(Damaged(range(1)))[0]
    with pytest.raises(OSError, match=r"^FOLDER, train: has no record 0; the number of records is 0$"):
        ReadableRecords(Records("FOLDER, train", []))[0]


def test_what_a_killed_run_has_left_is_removed(tmp_path):
    left = tmp_path / "numbers/incomplete.ABC123_1.0.0"
    left.mkdir(parents=True)
    (left / "shard").write_bytes(b"x")
    folder = write(tmp_path, METADATA)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failure_leaves_nothing_and_the_next_run_writes_all(tmp_path):
    def records():
        yield {"x": np.zeros(2, np.float32)}
        raise OSError(errno.ENOSPC, "No space left on device")

    schema = {"x": tfds.features.Tensor(shape=(2,), dtype=np.float32, encoding="bytes")}
    with pytest.raises(FullDiskError), full_disk_reported(tmp_path):
        write_dataset("numbers", tmp_path, lambda: schema, {"train": records()}, METADATA)
    assert not list((tmp_path / "numbers").iterdir())
    assert len(open_split(write(tmp_path, METADATA), "train")) == 3
