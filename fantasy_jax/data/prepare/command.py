"""The command line: a folder of raw videos becomes records for training."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fantasy_jax import cli
from fantasy_jax.config import ConfigError, as_json, build
from fantasy_jax.data.prepare.config import PrepareConfig
from fantasy_jax.data.prepare.encode import EncodedClips, dataset_settings, write_encoded
from fantasy_jax.data.prepare.report import write_report
from fantasy_jax.data.prepare.scan import Source, read_captions, scan, unmatched
from fantasy_jax.data.prepare.stages import Clip, OpenDetectors, Task, mediapipe_detectors
from fantasy_jax.data.prepare.store import StoredClips, picture_of, prepare_videos
from fantasy_jax.data.text import byte_tokenizer
from fantasy_jax.media import whole_or_nothing
from fantasy_jax.pipeline import ModelConfig, Networks, RandomNetworks, SampleConfig
from fantasy_jax.weights import StoredNetworks, record_hashes

EXAMPLES = """\
examples:
  python -m fantasy_jax.data.prepare --config=configs/fantasy_talking_14b.py --input=videos --output=out \\
      --captions=captions.csv --weights=weights/fantasy_talking_14b
  what a folder holds and what would be dropped, without the networks; they can follow by the line above:
  python -m fantasy_jax.data.prepare --config=configs/fantasy_talking_14b.py --input=videos --output=out \\
      --clips_only --config.prepare.min_sync=0.3

The same command goes on after an interruption. Then train:
  python train.py --config=configs/fantasy_talking_14b.py --weights=weights/fantasy_talking_14b \\
      --records=out/encoded_clips/1.0.0 --workdir=out/adapters
Every setting of the config file can be given as --config.NAME=VALUE; filters are those of prepare.
"""


@dataclass(frozen=True)
class Videos:
    """What is to be prepared.

    Attributes:
        sources: Each content once, and with a caption if there is a side file.
        prompts: By video.
        dropped: What is left out before it is opened.
        about_captions: Rows of the side file that name no video, and what is said of them.
    """

    sources: list[Source]
    prompts: dict[str, str]
    dropped: list[Clip]
    about_captions: dict[str, str]


def main(argv: list[str] | None = None, *, open_detectors: OpenDetectors = mediapipe_detectors) -> int:
    """Parses the command line and prepares; other detectors than MediaPipe's can be given."""
    arguments, config = cli.parse(_parser(), argv)
    if "prepare" not in config:
        raise ConfigError(f"{arguments.config}: has no section prepare")
    model = build(ModelConfig, config.model, "model")
    sampling = build(SampleConfig, config.sample, "sample")
    settings = build(PrepareConfig, config.prepare, "prepare")
    if arguments.face is not None:
        settings = replace(settings, face=arguments.face)
    task = Task(settings, sampling.fps, sampling.max_frames)
    weights = config.get("weights", "") if arguments.weights is None else arguments.weights
    networks = partial(_networks, weights, model)
    if not arguments.clips_only:
        networks()  # what is missing is said before any work
        if not weights:
            print("No weights given: they are random, and records are good for trying out alone.")
    with open_detectors(settings):
        pass
    videos, output = _find(arguments.input, arguments.captions), Path(arguments.output)
    identity = _identity(weights, model)
    if arguments.beam is not None:
        from fantasy_jax.data.prepare.beam import BeamRun

        run = BeamRun(videos.sources, videos.prompts, task, networks, open_detectors, output)
        folder, clips = run.write(arguments.beam.split(), dataset_settings(task, identity))
        _report(videos, clips, settings, output, lambda clip: None)
    else:
        work = output / "work" / _short(asdict(task))
        clips = _prepare(work, videos.sources, task, open_detectors, arguments.processes)
        kept = _report(videos, clips, settings, output, partial(picture_of, work))
        if arguments.clips_only:
            return 0
        encoded = EncodedClips(output / "work/encoded", networks(), identity, settings.batch_size)
        paths = encoded.encode(StoredClips(work, kept), videos.prompts)
        folder = write_encoded(output, paths, kept, videos.prompts, task=task, weights=identity)
    print(f"Wrote {folder}; train on it with train.py --records={folder}")
    return 0


def _find(folder: str, side_file: str | None) -> Videos:
    """Videos and captions; what does not match is told."""
    sources, left_out = scan(folder)
    dropped = [_whole(name, "", "same", message) for name, message in left_out.items()]
    if side_file is None:
        videos = Videos(sources, {source.name: "" for source in sources}, dropped, {})
    else:
        captions = read_captions(side_file)
        message = f"{side_file} has no prompt for it"
        missing = [source for source in sources if source.name not in captions]
        dropped += [_whole(source.name, source.digest, "caption", message) for source in missing]
        videos = Videos(
            [source for source in sources if source.name in captions],
            captions,
            dropped,
            unmatched(captions, {source.name for source in sources} | left_out.keys()),
        )
    for clip in videos.dropped:
        print(f"dropped: {clip.line}", file=sys.stderr)
    for name, message in videos.about_captions.items():
        print(f"{name}: {message}", file=sys.stderr)
    return videos


def _whole(name: str, digest: str, reason: str, message: str) -> Clip:
    return Clip(name, digest, -1, (0.0, 0.0), reason, message)


def _prepare(
    work: Path, sources: Sequence[Source], task: Task, open_detectors: OpenDetectors, processes: int
) -> list[Clip]:
    """All videos' clips; what is dropped or worth a line is told as it comes."""
    clips = []
    ready = prepare_videos(work, sources, task, open_detectors, processes=processes)
    for _, found in tqdm(ready, desc="Videos", unit="video", total=len(sources)):
        for clip in found:
            if clip.message:
                tqdm.write(f"{'dropped: ' if clip.dropped else ''}{clip.line}", file=sys.stderr)
        clips += found
    return clips


def _report(
    videos: Videos,
    clips: Sequence[Clip],
    settings: PrepareConfig,
    output: Path,
    picture_of: Callable[[Clip], bytes | None],
) -> list[Clip]:
    """Writes the report, and gives what is kept in the dataset's order."""
    everything = sorted(
        [*videos.dropped, *clips], key=lambda clip: (clip.source, clip.number < 0, clip.number)
    )
    report = output / "report.html"
    with whole_or_nothing(report) as partial_file:
        page = write_report(everything, videos.about_captions, settings, picture_of)
        partial_file.write_text(page, encoding="utf-8")
    kept = [clip for clip in everything if not clip.dropped]
    print(f"{len(kept)} of {len(everything)} clips are kept; {report} says what was dropped and why")
    if not kept:
        raise ConfigError(f"no clip is left; {report} says why")
    return kept


def _networks(weights: str, model: ModelConfig) -> Networks:
    return StoredNetworks(Path(weights), model) if weights else RandomNetworks(model, byte_tokenizer())


def _identity(weights: str, model: ModelConfig) -> Any:
    """What the encoded clips follow from, beside the clips."""
    hashes = record_hashes(Path(weights)) if weights else "random"
    return as_json({"model": model, "hashes": hashes})


def _short(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.data.prepare",
        description="Makes records for training from raw videos.",
        epilog=EXAMPLES,
    )
    cli.add_config_argument(parser)
    parser.add_argument("--input", required=True, metavar="DIR", help="videos, in folders of any depth")
    parser.add_argument("--output", required=True, metavar="DIR", help="where dataset, report and work go")
    parser.add_argument(
        "--captions",
        metavar="FILE",
        help="a .csv with the columns file_name and prompt, or .jsonl with these keys; "
        "names are paths below the input folder (default: prompts are empty)",
    )
    parser.add_argument("--weights", metavar="DIR", help="the store of the encoders (default: the config's)")
    parser.add_argument(
        "--face", type=int, metavar="N", help="which face is meant, from the left (default: the largest)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="that look at videos (default: as many as cores)",
    )
    more = parser.add_mutually_exclusive_group()
    more.add_argument("--clips_only", action="store_true", help="stop before the networks")
    more.add_argument(
        "--beam",
        metavar="OPTIONS",
        help="run as a pipeline of Apache Beam with these options, such as --beam='--runner=FlinkRunner'",
    )
    return parser
