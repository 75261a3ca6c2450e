"""The preparation as an Apache Beam pipeline through TFDS: on Dataflow, Flink, Spark, or one machine.

Workers read videos by the paths that the driver found, and write to the output: both must be on a file system
that all of them share.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions

from fantasy_jax.data.encoded import ClipEncoder, as_stored, features
from fantasy_jax.data.records import Record, RecordsBuilder
from fantasy_jax.files import atomic_write
from fantasy_jax.prepare import portrait, talking
from fantasy_jax.prepare.analysis import OpenDetectors, PrepareTask
from fantasy_jax.prepare.config import PortraitPrepareConfig
from fantasy_jax.prepare.encode import (
    DATASET,
    clips_metadata,
    fit_motion,
    held_out,
    intensities,
    motion_field,
)
from fantasy_jax.prepare.scan import SourceVideo
from fantasy_jax.prepare.stages import PreparedClip, prepare_video
from fantasy_jax.preprocessing.motion import MOTION_FILE, MotionNormaliser
from fantasy_jax.system.networks import Networks

_CLIPS = "clips.json"


class PrepareVideo(beam.DoFn):
    """Turns a video into its clips, kept and dropped; see `stages.prepare_video`."""

    def __init__(self, task: PrepareTask, open_detectors: OpenDetectors):
        """Takes what opens detectors, because each worker has its own."""
        self._task, self._open = task, open_detectors

    def setup(self) -> None:
        """Opens the detectors."""
        self._opened = ExitStack()
        self._detectors = self._opened.enter_context(self._open(self._task.config))

    def process(self, source: SourceVideo) -> Iterator[PreparedClip]:
        """Prepares one video."""
        yield from prepare_video(source, self._task, self._detectors)

    def teardown(self) -> None:
        """Closes the detectors."""
        self._opened.close()


class EncodeClip(beam.DoFn):
    """Turns a clip that is kept into a key and an encoded record; see `data.encoded`."""

    def __init__(self, networks: Callable[[], Networks], prompts: Mapping[str, str]):
        """Takes what makes the networks, because each worker builds its own."""
        self._networks, self._prompts = networks, prompts

    def setup(self) -> None:
        """Builds the encoders."""
        self._encoder = ClipEncoder(self._networks(), batch_size=1)

    def process(self, clip: PreparedClip, motion: MotionNormaliser) -> Iterator[tuple[str, Record]]:
        """Encodes one clip."""
        (record,) = self._encoder([clip.record | {"prompt": self._prompts[clip.source]}])
        yield f"{clip.digest}/{clip.number}", as_stored(record) | motion_field(clip, motion)


@dataclass(frozen=True)
class BeamRun:
    """Inputs of a pipeline.

    Attributes:
        sources: The videos.
        prompts: Prompts by video.
        task: Settings of the clips.
        networks: Makes the encoders; it must be picklable.
        open_detectors: Opens detectors; it must be picklable.
        output: Parent folder of the dataset.
    """

    sources: Sequence[SourceVideo]
    prompts: Mapping[str, str]
    task: PrepareTask
    networks: Callable[[], Networks]
    open_detectors: OpenDetectors
    output: Path

    def write(self, options: Sequence[str], metadata: Mapping[str, Any]) -> tuple[Path, list[PreparedClip]]:
        """Runs the pipeline.

        Args:
            options: Beam's options, as on its command lines: `--runner=FlinkRunner` and so on.
            metadata: Metadata of the dataset that are known before any clip is.

        Returns:
            The folder of the dataset, and all clips, without their records.
        """
        builder = PreparedClips(DATASET, self.output, features(self._example()), metadata)
        builder.run = self
        config = tfds.download.DownloadConfig(beam_options=PipelineOptions(list(options)))
        builder.download_and_prepare(download_config=config)
        folder = Path(builder.data_dir)
        clips = [PreparedClip.from_json(clip) for clip in json.loads((self.output / _CLIPS).read_text())]
        kept = sorted((c for c in clips if not c.dropped), key=lambda clip: (clip.source, clip.number))
        motion = fit_motion([intensities(clip) for clip in kept])
        if motion is not None:
            motion.save(self.output / MOTION_FILE)
        # The pipeline knows these only at its end, but TFDS takes metadata before.
        complete = {**metadata, **clips_metadata(kept, self.prompts, motion)}
        tfds.core.MetadataDict(complete).save_metadata(folder)
        return folder, clips

    def _example(self) -> Record:
        """Encodes a grey clip: Beam needs the schema before there is a record."""
        of_people = isinstance(self.task.config, PortraitPrepareConfig)
        grey = (portrait if of_people else talking).grey_record(self.task)
        (record,) = ClipEncoder(self.networks(), batch_size=1)([grey | {"prompt": ""}])
        return as_stored(record if of_people else record | {"motion": np.zeros(2, np.float32)})


class PreparedClips(RecordsBuilder):
    """A dataset whose splits are outputs of one pipeline."""

    run: BeamRun

    def _split_generators(self, download_manager: Any, pipeline: beam.Pipeline) -> dict[str, Any]:
        run = self.run
        clips = (
            pipeline
            | beam.Create(run.sources)
            | beam.Reshuffle()  # the next video may go to another worker
            | "Clips" >> beam.ParDo(PrepareVideo(run.task, run.open_detectors))
        )
        described = clips | beam.Map(PreparedClip.to_json)
        _ = described | "All" >> beam.combiners.ToList() | beam.Map(_write_json, run.output / _CLIPS)
        kept = clips | beam.Filter(lambda clip: not clip.dropped)
        motion = (
            kept | beam.Map(intensities) | "Intensities" >> beam.combiners.ToList() | beam.Map(fit_motion)
        )
        encode = beam.ParDo(EncodeClip(run.networks, run.prompts), beam.pvalue.AsSingleton(motion))
        encoded = kept | "Encode" >> encode
        fraction = run.task.config.test_fraction
        tests = beam.pvalue.AsSingleton(
            kept
            | beam.Map(lambda clip: clip.digest)
            | "Videos" >> beam.combiners.ToList()
            | beam.Map(lambda digests: held_out(set(digests), fraction))
        )
        return {
            "train": encoded | beam.Filter(lambda pair, tests: pair[0].split("/")[0] not in tests, tests),
            "test": encoded
            | "Test" >> beam.Filter(lambda pair, tests: pair[0].split("/")[0] in tests, tests),
        }


def _write_json(value: Any, path: Path) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value))
