"""Datasets of records on disk: TFDS with array records, complete or absent. TensorFlow is not needed."""

import itertools
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from os import PathLike
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from fantasy_jax.config import as_json, differences
from fantasy_jax.errors import ConfigError

Record = dict[str, Any]
METADATA_FILE = "metadata.json"
MAX_UNREADABLE = 10
"""Records of a split that are skipped if they cannot be read."""
_SHARD_BYTES = 2**30
"""Size from which on a file takes no further record."""


class _Uncompressed:
    """How TFDS' own writer, which Beam uses, writes a file of records."""

    def write(self, path: str | PathLike, examples: Iterable[tuple[Any, bytes]]) -> None:
        _write_file(path, (example for _, example in examples))


class RecordsBuilder(tfds.core.GeneratorBasedBuilder):
    """A TFDS builder; a subclass makes the records."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        name: str,
        directory: Path,
        features: Mapping[str, tfds.features.FeatureConnector],
        metadata: Mapping[str, Any],
    ):
        self.name = name
        self._features, self._metadata = features, metadata
        super().__init__(data_dir=str(directory), file_format="array_record")

    def download_and_prepare(self, **arguments: Any) -> None:
        """Writes the dataset, after removing what a run that was killed has left."""
        for left_behind in Path(self.data_dir).parent.glob("incomplete.*"):
            shutil.rmtree(left_behind)
        super().download_and_prepare(**arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(dict(self._features)),
            metadata=tfds.core.MetadataDict(self._metadata),
        )

    def _example_writer(self) -> _Uncompressed:
        return _Uncompressed()

    def _split_generators(self, *arguments: Any) -> dict[str, Any]:
        raise NotImplementedError

    def _generate_examples(self, *arguments: Any) -> Iterable[tuple[int, Record]]:
        raise NotImplementedError("splits are generators already")


class _GivenRecords(RecordsBuilder):
    """Writes given records in their order, one at a time.

    TFDS' own writer keeps up to 1 GiB of records in memory to shuffle them, and needs TensorFlow for more.
    The loader shuffles anyway.
    """

    splits: Mapping[str, Iterable[Record]]

    def _generate_splits(self, download_manager: Any, download_config: Any) -> list[tfds.core.SplitInfo]:
        return [self._write_split(split, records) for split, records in self.splits.items()]

    def _write_split(self, split: str, records: Iterable[Record]) -> tfds.core.SplitInfo:
        features, template = self.info.features, self._get_filename_template(split_name=split)
        serializer = ExampleSerializer(features.get_serialized_info())
        examples = (serializer.serialize_example(features.encode_example(record)) for record in records)
        shards = []
        for first in examples:
            path = Path(self.data_dir) / f"{split}.{len(shards)}"
            shards.append((path, *_write_file(path, itertools.chain([first], examples), _SHARD_BYTES)))
        if not shards:
            raise ConfigError(f"{self.data_dir}: there are no records for the split {split}")
        for index, (path, _, _) in enumerate(shards):
            path.rename(template.sharded_filepath(shard_index=index, num_shards=len(shards)))
        _, lengths, sizes = zip(*shards, strict=True)
        return tfds.core.SplitInfo(
            name=split, shard_lengths=list(lengths), num_bytes=sum(sizes), filename_template=template
        )


def _write_file(path: str | PathLike, examples: Iterable[bytes], full: int | None = None) -> tuple[int, int]:
    """Writes uncompressed array records, at most about `full` bytes; returns their number and size.

    Arrays of floats hardly shrink, and take long to decompress. What does shrink, such as images, is
    compressed by its own encoding.
    """
    count = size = 0
    with closing(ArrayRecordWriter(str(path), "group_size:1,uncompressed")) as writer:
        for example in examples:
            writer.write(example)
            count, size = count + 1, size + len(example)
            if full and size >= full:
                break
    return count, size


def write_dataset(
    name: str,
    directory: str | Path,
    features: Callable[[], Mapping[str, tfds.features.FeatureConnector]],
    splits: Mapping[str, Iterable[Record]],
    metadata: Mapping[str, Any],
) -> Path:
    """Writes a dataset unless it exists; it is moved into place when complete.

    Args:
        name: Name of the dataset.
        directory: Parent folder of datasets.
        features: Returns the schema of a record; called only if the dataset is written.
        splits: Records by split; lazy iterators, consumed only if the dataset is written.
        metadata: Settings that determine the records, stored with them.

    Returns:
        The folder of the records, for `tfds.builder_from_directory`.

    Raises:
        ConfigError: The dataset exists with other metadata.
    """
    tfds.disable_progress_bar()  # it knows no total
    folder = dataset_folder(name, directory)
    check_unchanged(folder, metadata)
    if not folder.exists():
        builder = _GivenRecords(name, Path(directory), features(), as_json(metadata))
        builder.splits = splits
        builder.download_and_prepare()
    return folder


def dataset_folder(name: str, directory: str | Path) -> Path:
    """The folder of the records of a dataset, complete or absent."""
    return Path(directory) / name / str(RecordsBuilder.VERSION)


def check_unchanged(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Checks that a dataset, if it exists, was made with exactly these settings.

    Raises:
        ConfigError: A setting differs.
    """
    if folder.exists():
        for key, one, other in differences(read_metadata(folder), as_json(metadata)):
            raise ConfigError(
                f"{key} was {one!r} when {folder} was made, and is now {other!r}; keep it, or remove that"
            )


class Records(Sequence):
    """The records of a split. One that is damaged raises an OSError, one line that names it."""

    def __init__(self, name: str, source: Any):
        """Wraps a data source of TFDS; `name` is for messages."""
        self._name, self._source = name, source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self._name}: has no record {index}; the number of records is {len(self)}")
        try:
            return self._source[index % len(self)]
        except Exception as error:  # damaged files make readers raise anything
            reason = " ".join(str(error).split())
            raise OSError(
                f"{self._name}: record {index} cannot be read ({type(error).__name__}: {reason}); copy the "
                "dataset again, or remake it"
            ) from error


class ReadableRecords:
    """Pairs of index and record; an unreadable record is replaced by the next one, which is logged once."""

    def __init__(self, source: Any, limit: int = MAX_UNREADABLE):
        """Wraps records.

        Args:
            source: Sequence of records.
            limit: Number of unreadable records above which an OSError is raised.
        """
        self._source, self._limit = source, min(limit, len(source) - 1)
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, Record]:
        while True:
            try:
                return index, self._source[index]
            except Exception as error:
                known = index in self._unreadable
                self._unreadable.add(index)
                if len(self._unreadable) > self._limit:
                    others = f"; {self._limit} others cannot be read either" if self._limit > 0 else ""
                    raise OSError(f"{error}{others}") from error
                if not known:
                    logging.getLogger(__name__).warning("%s; the next one takes its place", error)
                index = (index + 1) % len(self)


def open_split(folder: Path, split: str) -> Records:
    """Returns the records of a split.

    Raises:
        ConfigError: The folder holds no dataset, a damaged one, or one without this split.
    """
    builder = _open(folder)
    if split not in builder.info.splits:
        raise ConfigError(f"{folder}: has no split {split!r}, only {', '.join(builder.info.splits)}")
    for path in map(Path, builder.info.splits[split].filepaths):
        if not path.is_file() or not path.stat().st_size:
            raise ConfigError(f"{path}: is missing or empty; copy the dataset again, or remake it")
    return Records(f"{folder}, {split}", builder.as_data_source(split))


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """Returns the metadata that `write_dataset` stored with a dataset.

    Raises:
        ConfigError: The folder holds no dataset, or a damaged one.
    """
    return dict(_open(folder).info.metadata or {})


def check_metadata(folder: str | Path, wanted: Mapping[str, Any]) -> None:
    """Checks that a dataset was made with the settings that its use expects.

    Args:
        folder: Folder of the dataset.
        wanted: Expected metadata. Nested mappings are compared key by key; keys that either side lacks are
            skipped.

    Raises:
        ConfigError: The folder holds no dataset, one without metadata, or a value differs.
    """
    found = read_metadata(folder)
    if not (Path(folder) / METADATA_FILE).is_file():
        raise ConfigError(f"{folder}: has no {METADATA_FILE}; copy the records again, or remake them")
    for key, stored, value in differences(found, as_json(wanted)):
        if stored is not None and value is not None:
            raise ConfigError(
                f"{folder}: {key} of these records is {stored!r}, but {value!r} is configured; change the "
                "config, or remake the records"
            )


def _open(folder: str | Path) -> tfds.core.DatasetBuilder:
    try:
        builder = tfds.builder_from_directory(folder)
        _ = builder.info.metadata  # is read when it is asked for
    except Exception as error:  # damaged files make TFDS raise anything
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{folder}: holds no dataset, or a damaged one ({reason}); give a folder of records"
        ) from error
    return builder
