"""Shards of encoded records: array records in the encoding of the final dataset, one file per batch.

FOLDER/features.json            schema of the records, which is that of the dataset without `motion`
<name>.array_record      records of one batch, complete or absent
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from fantasy_jax.data.encoded import features
from fantasy_jax.data.records import Record
from fantasy_jax.files import atomic_write

_FEATURES = "features.json"


class RecordShards:
    """Shards of one schema in a folder."""

    def __init__(self, folder: Path):
        """Takes the folder, which need not exist yet."""
        self._folder = folder

    def path(self, name: str) -> Path:
        """Returns the file of a shard."""
        return self._folder / f"{name}.array_record"

    def write(self, name: str, records: Sequence[Record]) -> None:
        """Writes a shard, atomically; the first one decides the schema."""
        if not (self._folder / _FEATURES).exists():
            schema = tfds.features.FeaturesDict(features(records[0]))
            with atomic_write(self._folder / _FEATURES) as partial:
                partial.write_text(json.dumps(schema.to_json()))
        with atomic_write(self.path(name)) as partial:
            writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
            for record in records:
                writer.write(self._schema.serialize_example(record))
            writer.close()

    def read(self, name: str) -> list[Record]:
        """Reads the records of a shard."""
        reader = ArrayRecordReader(str(self.path(name)))
        try:
            return [self._schema.deserialize_example_np(example) for example in reader.read_all()]
        finally:
            reader.close()

    @property
    def features(self) -> Mapping[str, tfds.features.FeatureConnector]:
        """The schema."""
        return dict(self._schema)

    @cached_property
    def _schema(self) -> tfds.features.FeaturesDict:
        return tfds.features.FeatureConnector.from_json(json.loads((self._folder / _FEATURES).read_text()))


@dataclass(frozen=True)
class ShardedRecords:
    """Records of several shards, in order; every iteration reads one shard after another.

    Attributes:
        shards: The folder of shards.
        names: Names of the shards.
    """

    shards: RecordShards
    names: Sequence[str]

    def __iter__(self) -> Iterator[Record]:
        """Yields the records."""
        for name in self.names:
            yield from self.shards.read(name)
