"""Datasets of records on disk: TFDS, as array records, complete or not there. No TensorFlow is needed."""

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from fantasy_jax.config import ConfigError, as_json

Record = dict[str, Any]


class _Uncompressed:
    """Writes TFDS' array records as they are: arrays of floats hardly shrink, and take long to unpack.

    What does shrink, such as bytes of pictures, is packed by its own encoding.
    """

    def write(self, path: str | PathLike, examples: Iterable[tuple[Any, bytes]]) -> None:
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for _, example in examples:
            writer.write(example)
        writer.close()


class RecordsBuilder(tfds.core.GeneratorBasedBuilder):
    """A dataset of one version whose records somebody else makes."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        name: str,
        directory: Path,
        features: Mapping[str, tfds.features.FeatureConnector],
        splits: Mapping[str, Iterable[Record]],
        settings: Mapping[str, Any],
    ):
        self.name = name
        self._features, self._records, self._settings = features, splits, settings
        super().__init__(data_dir=str(directory), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(dict(self._features)),
            metadata=tfds.core.MetadataDict(self._settings),
        )

    def _example_writer(self) -> _Uncompressed:
        return _Uncompressed()

    def _split_generators(self, download_manager: Any) -> dict[str, Iterable[tuple[int, Record]]]:
        return {split: enumerate(records) for split, records in self._records.items()}

    def _generate_examples(self, *arguments: Any) -> Iterable[tuple[int, Record]]:
        raise NotImplementedError("the splits are generators already")


def write_dataset(
    name: str,
    directory: str | Path,
    features: Callable[[], Mapping[str, tfds.features.FeatureConnector]],
    splits: Mapping[str, Iterable[Record]],
    settings: Mapping[str, Any],
) -> Path:
    """Writes a dataset below a directory, unless it is there; it is moved into place when it is complete.

    Args:
        name: Of the dataset.
        directory: Where datasets lie.
        features: Makes the schema of a record; not asked where nothing is to be written.
        splits: The records of each; iterators that do nothing until they are asked.
        settings: What the records follow from.

    Returns:
        The folder of its records, to be read with `tfds.builder_from_directory`.

    Raises:
        ConfigError: Such a dataset lies there, made with other settings.
    """
    settings = as_json(settings)
    tfds.disable_progress_bar()  # it knows no total
    folder = Path(directory) / name / str(RecordsBuilder.VERSION)
    if not folder.exists():
        RecordsBuilder(name, Path(directory), features(), splits, settings).download_and_prepare()
        return folder
    written = dict(tfds.builder_from_directory(folder).info.metadata or {})
    if differing := [key for key, value in settings.items() if written.get(key) != value]:
        raise ConfigError(
            f"{folder}: was made with another {differing[0]}; remove it, or choose another folder"
        )
    return folder


def open_split(folder: Path, split: str) -> Any:
    """The records of a split, by number."""
    return tfds.builder_from_directory(folder).as_data_source(split)
