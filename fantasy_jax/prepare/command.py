"""The command line of the preparation: a folder of raw videos becomes records for training."""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from fantasy_jax import cli
from fantasy_jax.config import section
from fantasy_jax.disk import full_disk_reported
from fantasy_jax.errors import ConfigError
from fantasy_jax.files import atomic_write, check_outputs, lock_folder
from fantasy_jax.prepare import stages
from fantasy_jax.prepare.analysis import OpenDetectors, PrepareTask
from fantasy_jax.prepare.captions import CAPTION_COLUMNS, VIDEO_COLUMNS, match_captions, read_captions
from fantasy_jax.prepare.config import ClipsConfig, PortraitPrepareConfig, PrepareConfig
from fantasy_jax.prepare.encode import EncodedClips, Encoders, dataset_metadata, write_encoded
from fantasy_jax.prepare.report import ReadThumbnail, check_installed, render_report
from fantasy_jax.prepare.scan import SourceVideo, scan
from fantasy_jax.prepare.stages import PreparedClip
from fantasy_jax.prepare.store import StoredClips, prepare_videos, read_thumbnail
from fantasy_jax.preprocessing.text import byte_tokenizer
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Networks, random_networks
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.loading import stored_networks

EXAMPLES = """\
examples:
  python -m fantasy_jax.prepare --config=configs/fantasy_talking_14b.py --input=videos --output=out \\
      --captions=captions.csv --weights=weights/fantasy_talking_14b
  only the report of what would be dropped, without the networks; the command above continues from there:
  python -m fantasy_jax.prepare --config=configs/fantasy_talking_14b.py --input=videos --output=out \\
      --clips_only --config.prepare.min_sync=0.3
  clips of two people for portraits, with HQ-OpenHumanVid's captions:
  python -m fantasy_jax.prepare --config=configs/fantasy_portrait_14b.py --input=HQ-OpenHumanVid \\
      --captions=OpenHumanVid_part_001.csv --weights=weights/fantasy_portrait_14b --output=out \\
      --config.video.height=480 --config.video.width=832 --config.prepare.min_people=2

The same command resumes an interrupted run. Then train:
  python train.py --config=configs/fantasy_talking_14b.py --weights=weights/fantasy_talking_14b \\
      --records=out/encoded_clips/1.0.0 --workdir=out/adapters
--config.NAME=VALUE overrides any setting of the config file; filters are in the section prepare, the size,
length and frame rate of clips in the section video.
"""

TASKS = {
    "talking": PrepareConfig,
    "miniature": PrepareConfig,
    "portrait": PortraitPrepareConfig,
}
"""Settings of the clips for each task of a config."""
_REPORT = "report.html"
_PRINTED = 20
"""Messages about captions that are printed; the report has more."""


@dataclass(frozen=True)
class InputVideos:
    """The videos to prepare.

    Attributes:
        sources: Videos with distinct contents, and with a caption if there is a side file.
        prompts: Prompts by video.
        dropped: Videos that are dropped before they are opened.
        about_captions: Messages about captions that are not used, by the name in the side file.
    """

    sources: list[SourceVideo]
    prompts: dict[str, str]
    dropped: list[PreparedClip]
    about_captions: dict[str, str]


def main(argv: list[str] | None = None, *, open_detectors: OpenDetectors = stages.open_detectors) -> int:
    """Runs the command line; `open_detectors` opens the detectors."""
    arguments, config = cli.parse(_parser(), argv)
    if arguments.beam is not None and arguments.processes:
        raise ConfigError("--processes has no effect with --beam, whose options say how many there are")
    model = section(ModelConfig, config, "model")
    settings = _settings(config, arguments.face)
    inputs = [*cli.config_files(arguments.config, config), arguments.captions]
    check_outputs([Path(arguments.output) / _REPORT], inputs)
    task = PrepareTask(settings, section(VideoConfig, config, "video"))
    weights = config.get("weights", "") if arguments.weights is None else arguments.weights
    networks = partial(_networks, weights, model)
    check_installed()  # everything that is missing is reported before any work
    if not arguments.clips_only:
        networks()
        if not weights:
            print("Warning: no weights are given; random ones make records that are useful for tests only")
    with open_detectors(settings):
        pass
    videos = _find(arguments.input, arguments.captions, keep_uncaptioned=settings.keep_uncaptioned)
    output = Path(arguments.output)
    encoders = Encoders.of(model, Path(weights) if weights and not arguments.clips_only else None)
    with full_disk_reported(output), lock_folder(output):
        folder = _write(arguments, videos, task, networks, encoders, open_detectors)
    if folder is not None:
        print(f"Wrote {folder}; {_next_command(arguments.config, config.get('task'), weights, folder)}")
    return 0


def _settings(config: ConfigDict, face: int | None) -> ClipsConfig:
    """The section `prepare`, whose type is that of the config's task, with the face of the command line."""
    if str(config.get("task")) not in TASKS:
        raise ConfigError(f"task is {config.get('task')!r}; it must be one of {', '.join(TASKS)}")
    settings = section(TASKS[config.task], config, "prepare")
    if face is None:
        return settings
    if not isinstance(settings, PrepareConfig):
        raise ConfigError("--face has no effect: all faces of a portrait clip are used")
    return replace(settings, face=face)


def _write(
    arguments: argparse.Namespace,
    videos: InputVideos,
    task: PrepareTask,
    networks: Callable[[], Networks],
    encoders: Encoders,
    open_detectors: OpenDetectors,
) -> Path | None:
    """Writes work files, the report and the dataset; returns its folder, or None for clips only."""
    settings, output = task.config, Path(arguments.output)
    if arguments.beam is not None:
        from fantasy_jax.prepare.beam import BeamRun

        run = BeamRun(videos.sources, videos.prompts, task, networks, open_detectors, output)
        folder, clips = run.write(arguments.beam.split(), dataset_metadata(task, encoders))
        _report(videos, clips, settings, output, lambda clip: None)
        return folder
    work = output / "work" / _short_digest(task.as_json())
    clips = _prepare(work, videos.sources, task, open_detectors, arguments.processes)
    kept = _report(videos, clips, settings, output, partial(read_thumbnail, work))
    if arguments.clips_only:
        return None
    encoded = EncodedClips(output / "work/encoded", networks(), encoders, task)
    records = encoded.encode(StoredClips(work, kept), videos.prompts)
    return write_encoded(output, records, kept, videos.prompts, task=task, encoders=encoders)


def _next_command(config: str, task: str | None, weights: str, records: Path) -> str:
    """How to train on the records."""
    if task not in ("talking", "portrait"):
        return f"{config} does not train on records, but on clips of its own"
    if not weights:
        return "its encoders are random, and fit no store; prepare with --weights to train on it"
    return f"train on it: train.py --config={config} --weights={weights} --records={records} --workdir=DIR"


def _find(folder: str, side_file: str | None, *, keep_uncaptioned: bool) -> InputVideos:
    """Finds videos and captions; reports those that do not match."""
    sources, left_out = scan(folder)
    dropped = [
        PreparedClip.whole_video(SourceVideo("", name, ""), "same", message)
        for name, message in left_out.items()
    ]
    names = [source.name for source in sources]
    if side_file is None:
        prompts, unused = dict.fromkeys(names, ""), {}
    else:
        prompts, unused = match_captions(read_captions(side_file), [*names, *left_out])
    missing = [source for source in sources if source.name not in prompts]
    if keep_uncaptioned and missing:
        print(f"{side_file}: has no caption for {len(missing)} videos, whose prompts are empty")
        prompts |= {source.name: "" for source in missing}
    else:
        dropped += [
            PreparedClip.whole_video(source, "caption", f"has no caption in {side_file}")
            for source in missing
        ]
    for clip in dropped:
        print(f"dropped: {clip.line}", file=sys.stderr)
    for name, message in islice(unused.items(), _PRINTED):
        print(f"{name}: {message}", file=sys.stderr)
    if len(unused) > _PRINTED:
        print(f"{side_file}: {len(unused) - _PRINTED} more captions are not used", file=sys.stderr)
    return InputVideos([source for source in sources if source.name in prompts], prompts, dropped, unused)


def _prepare(
    work: Path,
    sources: Sequence[SourceVideo],
    task: PrepareTask,
    open_detectors: OpenDetectors,
    processes: int,
) -> list[PreparedClip]:
    """Prepares all videos; prints messages of clips as they are ready."""
    clips = []
    ready = prepare_videos(work, sources, task, open_detectors, processes=processes)
    for _, found in tqdm(ready, desc="Videos", unit="video", total=len(sources)):
        for clip in found:
            if clip.message:
                tqdm.write(f"{'dropped: ' if clip.dropped else ''}{clip.line}", file=sys.stderr)
        clips += found
    return clips


def _report(
    videos: InputVideos,
    clips: Sequence[PreparedClip],
    settings: ClipsConfig,
    output: Path,
    thumbnails: ReadThumbnail,
) -> list[PreparedClip]:
    """Writes the report, and returns the clips that are kept in the order of the dataset."""
    everything = sorted(
        [*videos.dropped, *clips], key=lambda clip: (clip.source, clip.number < 0, clip.number)
    )
    report = output / _REPORT
    with atomic_write(report) as partial_file:
        page = render_report(everything, videos.about_captions, settings, thumbnails)
        partial_file.write_text(page, encoding="utf-8")
    kept = [clip for clip in everything if not clip.dropped]
    print(f"Kept {len(kept)} of {len(everything)} clips; {report} shows what was dropped and why")
    if not kept:
        raise ConfigError(f"all clips were dropped; {report} shows why")
    return kept


def _networks(weights: str, model: ModelConfig) -> Networks:
    # Only the encoders are used: the store need not have the adapters that will be trained, and no LoRA is
    # merged, which 8-bit weights would refuse.
    return (
        stored_networks(weights, model, new_adapters=True, merge_lora=False)
        if weights
        else random_networks(model, byte_tokenizer())
    )


def _short_digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.prepare",
        description="Makes records for training from raw videos.",
        epilog=EXAMPLES,
    )
    cli.add_config_argument(parser)
    parser.add_argument("--input", required=True, metavar="DIR", help="videos, in folders of any depth")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder of the dataset, the report and the work files"
    )
    parser.add_argument(
        "--captions",
        metavar="PATH",
        help=f"a .csv, .jsonl or .json file that names videos ({', '.join(VIDEO_COLUMNS)}) and captions "
        f"({', '.join(CAPTION_COLUMNS)}), or a folder of .txt files named like the videos, such as the "
        "input folder (default: prompts are empty)",
    )
    parser.add_argument(
        "--weights", metavar="DIR", help="weight store of the encoders (default: the config's)"
    )
    parser.add_argument(
        "--face",
        type=cli.integer(1),
        metavar="N",
        help="face to use, counted from the left (default: the largest)",
    )
    parser.add_argument(
        "--processes",
        type=cli.integer(1, 1024),
        metavar="N",
        help="processes that analyse videos (default: the number of cores)",
    )
    more = parser.add_mutually_exclusive_group()
    more.add_argument("--clips_only", action="store_true", help="stop before the clips are encoded")
    more.add_argument(
        "--beam",
        metavar="OPTIONS",
        help="run as an Apache Beam pipeline with these options, such as --beam='--runner=FlinkRunner'",
    )
    return parser
