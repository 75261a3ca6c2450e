"""The same stages under Apache Beam, through TFDS: on Dataflow, Flink, Spark, or on this machine.

Workers read the videos by the paths that the driver found, and write where it says: both lie on a file
system that all of them see.
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
from fantasy_jax.data.face_crop import CROP_SIZE, TEMPLATE
from fantasy_jax.data.motion import MOTION_FILE, MotionNormaliser
from fantasy_jax.data.prepare.encode import DATASET, fit_motion, held_out, intensities
from fantasy_jax.data.prepare.scan import Source
from fantasy_jax.data.prepare.stages import Clip, OpenDetectors, Task, prepare_video
from fantasy_jax.data.records import Record, RecordsBuilder
from fantasy_jax.data.speech import SAMPLE_RATE
from fantasy_jax.media import whole_or_nothing
from fantasy_jax.pipeline import Networks

_CLIPS = "clips.json"


class PrepareVideo(beam.DoFn):
    """A video to its clips, kept and dropped; see `stages.prepare_video`."""

    def __init__(self, task: Task, open_detectors: OpenDetectors):
        """Keeps what opens detectors, so that each worker has its own."""
        self._task, self._open = task, open_detectors

    def setup(self) -> None:
        """Opens the detectors."""
        self._opened = ExitStack()
        self._detectors = self._opened.enter_context(self._open(self._task.config))

    def process(self, source: Source) -> Iterator[Clip]:
        """One video."""
        yield from prepare_video(source, self._task, self._detectors)

    def teardown(self) -> None:
        """Closes them."""
        self._opened.close()


class EncodeClip(beam.DoFn):
    """A kept clip to a key and a record that is trained on; see `data.encoded`."""

    def __init__(self, networks: Callable[[], Networks], prompts: Mapping[str, str]):
        """Keeps what makes the networks, so that each worker builds its own."""
        self._networks, self._prompts = networks, prompts

    def setup(self) -> None:
        """Builds the encoders."""
        self._encoder = ClipEncoder(self._networks(), batch_size=1)

    def process(self, clip: Clip, motion: MotionNormaliser) -> Iterator[tuple[str, Record]]:
        """One clip."""
        (record,) = self._encoder([clip.record | {"prompt": self._prompts[clip.source]}])
        moves = np.array(motion(intensities(clip)), np.float32)
        yield f"{clip.digest}/{clip.number}", as_stored(record | {"motion": moves})


@dataclass(frozen=True)
class BeamRun:
    """What a pipeline needs.

    Attributes:
        sources: The videos.
        prompts: By video.
        task: What clips follow from.
        networks: Makes the encoders; it must pickle.
        open_detectors: Opens detectors; it must pickle.
        output: Where the dataset goes.
    """

    sources: Sequence[Source]
    prompts: Mapping[str, str]
    task: Task
    networks: Callable[[], Networks]
    open_detectors: OpenDetectors
    output: Path

    def write(self, options: Sequence[str], settings: Mapping[str, Any]) -> tuple[Path, list[Clip]]:
        """Runs the pipeline.

        Args:
            options: Beam's, as on its command lines: `--runner=FlinkRunner` and so on.
            settings: What the records follow from, for the dataset's metadata.

        Returns:
            The folder of the dataset, and all clips, without their records.
        """
        builder = PreparedClips(DATASET, self.output, features(self._example()), {}, settings)
        builder.run = self
        config = tfds.download.DownloadConfig(beam_options=PipelineOptions(list(options)))
        builder.download_and_prepare(download_config=config)
        described = json.loads((self.output / _CLIPS).read_text())
        return Path(builder.data_dir), [Clip.from_json(clip) for clip in described]

    def _example(self) -> Record:
        """A record of a grey clip: Beam wants the schema before there is a record."""
        height, width = self.task.config.size
        frames, samples = self.task.num_frames, int(self.task.num_frames / self.task.fps * SAMPLE_RATE)
        grey = {
            "video": np.full((frames, height, width, 3), 128, np.uint8),
            "lips": np.zeros((frames, height, width), np.uint8),
            "sound": np.zeros(samples, np.int16),
            "prompt": "",
            "face_points": TEMPLATE * min(height, width) / CROP_SIZE,
        }
        (record,) = ClipEncoder(self.networks(), batch_size=1)([grey])
        return as_stored(record | {"motion": np.zeros(2, np.float32)})


class PreparedClips(RecordsBuilder):
    """Splits that are the ends of one pipeline."""

    run: BeamRun

    def _split_generators(self, download_manager: Any, pipeline: beam.Pipeline) -> dict[str, Any]:
        run = self.run
        clips = (
            pipeline
            | beam.Create(run.sources)
            | beam.Reshuffle()  # a worker that takes one video need not take the next
            | "Clips" >> beam.ParDo(PrepareVideo(run.task, run.open_detectors))
        )
        described = clips | beam.Map(Clip.to_json)
        _ = described | "All" >> beam.combiners.ToList() | beam.Map(_write_json, run.output / _CLIPS)
        kept = clips | beam.Filter(lambda clip: not clip.dropped)
        motion = (
            kept | beam.Map(intensities) | "Intensities" >> beam.combiners.ToList() | beam.Map(fit_motion)
        )
        _ = motion | "Save" >> beam.Map(lambda fitted, path: fitted.save(path), run.output / MOTION_FILE)
        encode = beam.ParDo(EncodeClip(run.networks, run.prompts), beam.pvalue.AsSingleton(motion))
        encoded = kept | "Encode" >> encode
        share = run.task.config.test_share
        tests = beam.pvalue.AsSingleton(
            kept
            | beam.Map(lambda clip: clip.digest)
            | "Videos" >> beam.combiners.ToList()
            | beam.Map(lambda digests: held_out(set(digests), share))
        )
        return {
            "train": encoded | beam.Filter(lambda pair, tests: pair[0].split("/")[0] not in tests, tests),
            "test": encoded
            | "Test" >> beam.Filter(lambda pair, tests: pair[0].split("/")[0] in tests, tests),
        }


def _write_json(value: Any, path: Path) -> None:
    with whole_or_nothing(path) as partial:
        partial.write_text(json.dumps(value))
