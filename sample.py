"""Makes portraits talk or act, from a picture with speech or driving videos, and dubs existing videos."""

if __name__ == "__main__":
    from fantasy_jax.cli import exit_on_interrupt

    exit_on_interrupt("sample.py")

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from fantasy_jax import cli, media
from fantasy_jax.config import section
from fantasy_jax.errors import ConfigError
from fantasy_jax.files import check_outputs, is_stream
from fantasy_jax.performance import ahead
from fantasy_jax.performance.programs import sampling_programs
from fantasy_jax.pipelines.base import Pipeline
from fantasy_jax.pipelines.batch import ClipRequest, read_batch, run_batch
from fantasy_jax.pipelines.config import PipelineConfig
from fantasy_jax.pipelines.dubbing import FantasyDubbingPipeline
from fantasy_jax.pipelines.latents import keep_latents, read_latents, read_noise, save_latents
from fantasy_jax.pipelines.output import VideoOutput
from fantasy_jax.pipelines.portrait import FantasyPortraitPipeline
from fantasy_jax.pipelines.sounds import read_sounds
from fantasy_jax.pipelines.talking import FantasyTalkingPipeline
from fantasy_jax.preprocessing.boxes import parse_box
from fantasy_jax.preprocessing.face_masks import MASK_MODES
from fantasy_jax.preprocessing.text import byte_tokenizer
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import random_networks
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.inspect import store_paths

EXAMPLES = """\
examples:
  python sample.py --config=configs/tiny.py --image=portrait.png --audio=speech.wav --output=out/talk.mp4
  python sample.py --config=configs/tiny.py --image=portrait.jpg --audio=song.mp3 --prompt="A man sings." \\
      --output=out/song.mp4 --seed=7 --config.sample.num_inference_steps=20
  ten seconds of a recording from its third minute on, of an exact size, with windows that overlap more:
  python sample.py --config=configs/fantasy_talking_14b.py --image=portrait.png --audio=speech.wav \\
      --output=out/ten.mp4 --start=120 --seconds=10 --size=480x832 --config.sample.overlap=7
  several clips with one start; pairs.csv has the columns image, audio, prompt and output:
  python sample.py --config=configs/tiny.py --batch=pairs.csv
  with a motion adapter, a face that hardly moves on a lively body (0.5 is usual):
  python sample.py --config=configs/tiny.py --image=portrait.png --audio=speech.wav --output=out/talk.mp4 \\
      --config.sample.face_motion=0.1 --config.sample.body_motion=0.9
  a picture of two people, of whom the right one speaks; both, each with a sound; a drawing, with boxes:
  python sample.py --config=configs/fantasy_talking_14b.py --image=two.png --audio=a.wav --person=2 \\
      --output=out/right.mp4
  python sample.py --config=configs/fantasy_talking_14b.py --image=two.png --audio=a.wav --audio=b.wav \\
      --output=out/both.mp4
  python sample.py --config=configs/fantasy_talking_14b.py --image=cats.png --audio=a.wav --person=1 \\
      --box=0.1,0.2,0.4,0.6 --box=0.6,0.2,0.9,0.6 --output=out/left.mp4
  a song: the separated voice moves the mouth, and the video plays the whole song:
  python sample.py --config=configs/fantasy_talking_14b.py --image=woman.png --audio=song.mp3 \\
      --voice=vocals.wav --prompt="A woman sings." --output=out/song.mp4

  The 14B model, with weights from `convert_weights.py import --output=weights/fantasy_talking_14b`:
  python sample.py --config=configs/fantasy_talking_14b.py --weights=weights/fantasy_talking_14b \\
      --image=woman.png --audio=woman.wav --prompt="A woman is talking." --output=out/woman.mp4
  from PyTorch's noise, with the latents saved for comparison:
  python sample.py --config=configs/fantasy_talking_14b.py --weights=weights/fantasy_talking_14b \\
      --image=woman.png --audio=woman.wav --prompt="A woman is talking." --output=out/woman.mp4 \\
      --noise=noise.safetensors --save_latents=out/latents.safetensors
  the video of latents that were saved, or that were kept because the disk was full:
  python sample.py --config=configs/fantasy_talking_14b.py --weights=weights/fantasy_talking_14b \\
      --latents=out/latents.safetensors --audio=woman.wav --output=out/woman.mp4
  the same path with small random weights:
  python sample.py --config=configs/fantasy_talking_14b.py:debug --image=woman.png --audio=woman.wav \\
      --output=out/debug.mp4

  the speaker of a video says something else; beside the mp4 a sheet shows source and result:
  python sample.py --config=configs/tiny.py --video=talking.mp4 --audio=speech.wav --output=out/dubbed.mp4
  the second of two people; music and noises of the video, separated from its speech, under the new one:
  python sample.py --config=configs/tiny.py --video=interview.mp4 --audio=speech.wav --person=2 \\
      --background=music.wav --output=out/dubbed.mp4

  FantasyPortrait: two people of a picture, from left to right, each with a driving video:
  python sample.py --config=configs/fantasy_portrait_14b.py --image=two.png --driver=a.mp4 --driver=b.mp4 \\
      --output=out/act.mp4
  one video that shows two people; first see who drives whom:
  python sample.py --config=configs/fantasy_portrait_14b.py --image=two.png --driver=both.mp4 \\
      --overlay=out/overlay.mp4 --output=out/act.mp4
  the right one of two people alone; a drawing, in which no face is found:
  python sample.py --config=configs/fantasy_portrait_14b.py --image=two.png --driver=a.mp4 --person=2 \\
      --output=out/right.mp4
  python sample.py --config=configs/fantasy_portrait_14b.py --image=cats.png --driver=a.mp4 --driver=b.mp4 \\
      --box=0.1,0.2,0.4,0.6 --box=0.6,0.2,0.9,0.6 --output=out/cats.mp4

  memory and time of each network on eight chips, compiled for them on this machine; nothing is sampled:
  python sample.py --config=configs/fantasy_talking_14b.py --compile_only --topology=v6e:2x4 \\
      --config.sample.mesh.context=2 --config.sample.mesh.tensor=4

Every setting of the config file can be given as --config.NAME=VALUE.
"""

PIPELINES: dict[str, type[Pipeline]] = {
    "talking": FantasyTalkingPipeline,
    "miniature": FantasyTalkingPipeline,
    "portrait": FantasyPortraitPipeline,
}
"""Pipelines by the task of the config."""

OPTIONS = {
    FantasyTalkingPipeline: ("audio", "voice", "batch", "person", "box", "people"),
    FantasyDubbingPipeline: ("audio", "video", "mask", "background", "person", "box"),
    FantasyPortraitPipeline: ("driver", "sound", "overlay", "person", "box", "people"),
}
"""Options that not every pipeline has."""

REPLACED = {
    "latents": (
        *("image", "prompt", "seed", "noise", "save_latents", "voice", "batch", "person", "box"),
        *("video", "mask", "background", "driver", "overlay"),
    ),
    "noise": ("seed",),
}
"""Options that have no effect with another one."""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and samples clips, or compiles the programs that would."""
    arguments, config = cli.parse(_parser(), argv)
    if str(config.get("task")) not in PIPELINES:
        raise ConfigError(f"task is {config.get('task')!r}; it must be one of {', '.join(PIPELINES)}")
    pipeline_type = _pipeline_type(config, arguments)
    model = section(ModelConfig, config, "model")
    video = section(VideoConfig, config, "video")
    settings = section(pipeline_type.config_type, config, "sample")
    piece = {"start": arguments.start, "max_seconds": arguments.seconds}
    settings = replace(settings, **{name: x for name, x in piece.items() if x is not None})
    if ahead.is_requested(arguments, also=("size",)):
        programs = partial(sampling_programs, model, settings, people=arguments.people or 1)
        return ahead.compile_and_report(arguments, video, settings.mesh, programs)
    ahead.parse_size(arguments.size)  # an error now, rather than after the weights are read
    requests = _requests(arguments, pipeline_type)
    _check_files(arguments, config, requests)
    pipeline = _pipeline(pipeline_type, config, arguments, model, video, settings)
    sample = _decode if arguments.latents else SAMPLERS[pipeline_type]
    return run_batch(requests, partial(sample, pipeline, arguments))


def _check_files(arguments: argparse.Namespace, config: ConfigDict, requests: Sequence[ClipRequest]) -> None:
    """Checks all outputs before any work: none is an input, and each can be written as what its name says."""
    read = [*arguments.driver, *arguments.voice, *(x for r in requests for x in (r.image, *r.audio))]
    given = [arguments.batch, arguments.noise, arguments.latents, arguments.sound, arguments.background]
    used = [*cli.config_files(arguments.config, config), *store_paths(_weights(arguments, config))]
    videos = [arguments.overlay, *(r.output for r in requests)]
    written = [arguments.save_latents, arguments.overlay, *(x for r in requests for x in r.outputs)]
    check_outputs(written, [*used, *given, *read])
    for path in filter(None, videos):
        media.video_format(path)
    for request in requests:
        media.check_sheet(request.outputs[1])
    saved = arguments.save_latents
    if saved and not is_stream(saved) and Path(saved).suffix != ".safetensors":
        raise ConfigError(f"--save_latents={saved}: the name must end in .safetensors")


def _decode(pipeline: Pipeline, arguments: argparse.Namespace, request: ClipRequest) -> None:
    """Decodes saved latents and writes the clip."""
    latents, num_frames = read_latents(arguments.latents, pipeline.networks.config.vae.latent_channels)
    sound = {}
    if played := [*request.audio, *filter(None, [arguments.sound])]:
        sounds = read_sounds(played, max_seconds=pipeline.config.max_seconds)
        sound = {"audio": sounds.played, "audio_seconds": sounds.seconds, "audio_rate": sounds.rate}
    _write(pipeline.decode(latents, num_frames, progress=True, **sound), arguments, request)


def _talk(pipeline: FantasyTalkingPipeline, arguments: argparse.Namespace, request: ClipRequest) -> None:
    """Samples one clip of FantasyTalking and writes it."""
    prompt = request.prompt or arguments.prompt
    given = {} if prompt is None else {"prompt": prompt}
    boxes = [parse_box(text, option="--box") for text in arguments.box]
    output = pipeline(
        request.image,
        request.audio,
        people=arguments.person,
        boxes=boxes,
        size=ahead.parse_size(arguments.size),
        voice=arguments.voice or None,
        **given,
        **_sampling(arguments),
    )
    _write(output, arguments, request)


def _act(pipeline: FantasyPortraitPipeline, arguments: argparse.Namespace, request: ClipRequest) -> None:
    """Samples one clip of FantasyPortrait and writes it."""
    boxes = [parse_box(text, option="--box") for text in arguments.box]
    with cli.timed("Driving videos"):
        scene = pipeline.scene(
            request.image,
            arguments.driver,
            boxes=boxes,
            people=arguments.person,
            size=ahead.parse_size(arguments.size),
            progress=True,
        )
    for note in scene.notes:
        print(note)
    if arguments.overlay:
        media.write_video(arguments.overlay, scene.overlay(), pipeline.video.fps)
        print(f"Wrote {arguments.overlay}: the drivers, and whom they drive")
    output = pipeline(
        scene, prompt=arguments.prompt or "", sound=arguments.sound or None, **_sampling(arguments)
    )
    _write(output, arguments, request)
    if output.audio is None:
        print("No driver has sound that can be read, and the video has none.")


def _dub(pipeline: FantasyDubbingPipeline, arguments: argparse.Namespace, request: ClipRequest) -> None:
    """Dubs a video and writes it."""
    if len(request.audio) > 1:
        raise ConfigError("--audio is given several times; --video takes one, the new speech")
    given = {} if arguments.prompt is None else {"prompt": arguments.prompt}
    output = pipeline(
        request.image,
        request.audio[0],
        mask=arguments.mask or "mouth",
        people=arguments.person,
        boxes=[parse_box(text, option="--box") for text in arguments.box],
        background=arguments.background,
        report=print,
        **given,
        **_sampling(arguments),
    )
    video, sheet = request.outputs
    with cli.timed("Video and audio to mp4"):
        output.save(video, sheet=sheet)
    source = output.plan.source
    print(
        f"Wrote {video}: {output.plan.num_frames} frames of {source.width} x {source.height} at "
        f"{float(output.fps):g} frames per second"
    )
    print(f"Wrote {sheet}: frames of the source, and below each the dubbed one")


SAMPLERS = {FantasyTalkingPipeline: _talk, FantasyDubbingPipeline: _dub, FantasyPortraitPipeline: _act}


def _pipeline_type(config: ConfigDict, arguments: argparse.Namespace) -> type[Pipeline]:
    """The pipeline of the config's task, or the one that dubs a video.

    Raises:
        ConfigError: An option is given that it does not have.
    """
    pipeline_type, task = PIPELINES[config.task], f"the task {config.task} of {arguments.config}"
    refused: list[str] = []
    if pipeline_type is FantasyTalkingPipeline and arguments.video:
        pipeline_type, task = FantasyDubbingPipeline, "--video"
        refused = ["image", "noise", "save_latents", "size"]
    refused += [name for names in OPTIONS.values() for name in names if name not in OPTIONS[pipeline_type]]
    if given := [name for name in refused if getattr(arguments, name)]:
        raise ConfigError(f"--{given[0]} does not go with {task}")
    for option, names in REPLACED.items():
        if given := [
            x for x in names if getattr(arguments, option) and getattr(arguments, x) not in (None, [])
        ]:
            raise ConfigError(f"--{given[0]} has no effect with --{option}")
    return pipeline_type


def _sampling(arguments: argparse.Namespace) -> dict[str, object]:
    """The arguments that every pipeline takes."""
    noise: Callable | None = partial(read_noise, arguments.noise) if arguments.noise else None
    return {"seed": arguments.seed or 0, "noise": noise, "timed": cli.timed, "progress": True}


def _write(output: VideoOutput, arguments: argparse.Namespace, request: ClipRequest) -> None:
    """Writes a clip, its contact sheet and, where they are asked for, its latents."""
    if arguments.save_latents:
        save_latents(arguments.save_latents, output.latents, output.num_frames)
        print(f"Wrote {arguments.save_latents}: the latents")
    video, sheet = request.outputs
    saved = arguments.save_latents or arguments.latents
    saved = None if saved and is_stream(saved) else saved
    with (
        cli.timed("Latents to video"),
        keep_latents(video, output.latents, output.num_frames, saved=saved),
    ):
        output.save(video, sheet=sheet)
    size = f"{output.width} x {output.height}"
    print(f"Wrote {video}: {output.num_frames} frames of {size} at {output.fps} frames per second")
    print(f"Wrote {sheet}: a contact sheet of its frames")


def _requests(arguments: argparse.Namespace, pipeline_type: type[Pipeline]) -> Sequence[ClipRequest]:
    """The clips of the command line: one, or those of a batch file."""
    shown = "video" if pipeline_type is FantasyDubbingPipeline else "image"
    needed = (shown, "driver" if pipeline_type is FantasyPortraitPipeline else "audio", "output")
    needed = ("output",) if arguments.latents else needed
    if arguments.batch:
        single = (*needed, "voice", "person", "box", "noise", "save_latents")
        if given := [name for name in single if getattr(arguments, name)]:
            raise ConfigError(f"--{given[0]} does not go with --batch, whose rows name their files")
        return read_batch(arguments.batch)
    for name in needed:
        if not getattr(arguments, name):
            raise ConfigError(f"--{name} is needed; sample.py --help shows examples")
    if not Path(arguments.output).name:
        raise ConfigError(f"--output={arguments.output}: is a folder; give the name of a file")
    return [ClipRequest(getattr(arguments, shown) or "", tuple(arguments.audio), "", Path(arguments.output))]


def _weights(arguments: argparse.Namespace, config: ConfigDict) -> str:
    """The store of weights; empty for random ones."""
    return str(config.get("weights", "") if arguments.weights is None else arguments.weights)


def _pipeline(
    pipeline_type: type[Pipeline],
    config: ConfigDict,
    arguments: argparse.Namespace,
    model: ModelConfig,
    video: VideoConfig,
    settings: PipelineConfig,
) -> Pipeline:
    """A pipeline with the weights of a store, or with random ones."""
    if weights := _weights(arguments, config):
        return pipeline_type.from_pretrained(
            weights, model=model, video=video, config=settings, keep=settings.keep
        )
    print("No weights given: they are random, and the video will be noise.")
    return pipeline_type(random_networks(model, byte_tokenizer()), video, settings)


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="sample.py", description=__doc__, epilog=EXAMPLES)
    cli.add_config_argument(parser)
    parser.add_argument("--image", help="the portrait, in any common format")
    parser.add_argument("--prompt", help="what the video shows (default: the pipeline's)")
    parser.add_argument("--output", help="the mp4 to write, and beside it a contact sheet (.png)")
    parser.add_argument(
        "--weights",
        metavar="DIR",
        help="the store of weights (default: the config's; with '' they are random)",
    )
    parser.add_argument(
        "--seed",
        type=cli.integer(0, 2**64 - 1),
        metavar="N",
        help="seed of the initial noise, of at most 64 bits (default: 0)",
    )
    parser.add_argument(
        "--start",
        type=float,
        metavar="SECONDS",
        help="leave out this much of the sounds, or of the driving videos, at the beginning "
        "(--config.sample.start)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="use this much of them (--config.sample.max_seconds; default: all)",
    )
    parser.add_argument(
        "--noise",
        metavar="FILE",
        help="start from the tensor `noise` in this safetensors file, [1, C, F, h, w], instead of a seed's",
    )
    parser.add_argument(
        "--save_latents",
        metavar="FILE",
        help="write the final latents as a safetensors file: the tensor `latents`, with the same layout",
    )
    parser.add_argument(
        "--latents",
        metavar="FILE",
        help="decode such latents instead of sampling any; --audio, or --sound of FantasyPortrait, is played",
    )
    _add_people(parser.add_argument_group("several people in the picture"))
    _add_talking(parser.add_argument_group("FantasyTalking"))
    _add_dubbing(parser.add_argument_group("Dubbing, with FantasyTalking"))
    _add_portrait(parser.add_argument_group("FantasyPortrait"))
    ahead.add_arguments(parser)
    return parser


def _add_people(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--person",
        action="append",
        default=[],
        type=cli.integer(0),
        metavar="N",
        help="who speaks a sound, or whom a driver drives, counted from 1, from the left; once for each "
        "--audio or --driver; others keep still",
    )
    group.add_argument(
        "--box",
        action="append",
        default=[],
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="a person's face, as fractions of the picture, where detection fails; once for each person, who "
        "are then counted in this order",
    )
    group.add_argument(
        "--people", type=cli.integer(1, 1024), metavar="N", help="people of the clip, for --compile_only"
    )


def _add_talking(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--audio",
        action="append",
        default=[],
        metavar="FILE",
        help="the speech: an audio file, or a video with audio; once for each person who speaks, from left "
        "to right",
    )
    group.add_argument(
        "--voice",
        action="append",
        default=[],
        metavar="FILE",
        help="the separated voice of a sound, without music or noise: it moves the mouth, and --audio is "
        "what the video plays; once for each --audio",
    )
    group.add_argument(
        "--batch",
        metavar="FILE",
        help="a CSV file with the columns image, audio, prompt and output, a clip in each row",
    )


def _add_dubbing(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--video",
        metavar="FILE",
        help="a video whose speaker says --audio instead; where a scene shows several people, --person or "
        "--box says who, once for all scenes or once for each, and --person=0 leaves a scene as it is",
    )
    group.add_argument(
        "--mask",
        choices=MASK_MODES,
        help="what is generated: the lower face, the whole face, or with none everything around the face "
        "(default: mouth)",
    )
    group.add_argument(
        "--background", metavar="FILE", help="sound that is mixed with --audio, such as the video's music"
    )


def _add_portrait(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--driver",
        action="append",
        default=[],
        metavar="FILE",
        help="a driving video, or a picture whose expression is held; once for each person, from left to "
        "right, or one video that shows several people",
    )
    group.add_argument(
        "--sound", metavar="FILE", help="the video's sound (default: the first driver's that has any)"
    )
    group.add_argument(
        "--overlay", metavar="FILE", help="write an mp4 that shows who drives whom, before the clip is made"
    )


if __name__ == "__main__":
    cli.run(main, "sample.py")
