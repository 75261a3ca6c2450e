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
from fantasy_jax.diffusion.magcache import Calibration, write_curve
from fantasy_jax.errors import ConfigError
from fantasy_jax.files import check_outputs, is_stream
from fantasy_jax.performance import ahead
from fantasy_jax.performance.cache import keep_compiled_programs
from fantasy_jax.performance.programs import sampling_programs
from fantasy_jax.pipelines.arguments import sampling_parser
from fantasy_jax.pipelines.base import Pipeline
from fantasy_jax.pipelines.batch import ClipRequest, read_batch, run_batch
from fantasy_jax.pipelines.config import PipelineConfig
from fantasy_jax.pipelines.dubbed_video import DubbedVideo
from fantasy_jax.pipelines.dubbing import FantasyDubbingPipeline
from fantasy_jax.pipelines.latents import keep_latents, read_latents, read_noise, save_latents
from fantasy_jax.pipelines.output import VideoOutput
from fantasy_jax.pipelines.portrait import FantasyPortraitPipeline
from fantasy_jax.pipelines.previews import PreviewFiles
from fantasy_jax.pipelines.sounds import read_sounds
from fantasy_jax.pipelines.talking import FantasyTalkingPipeline
from fantasy_jax.pipelines.tasks import pipeline_of
from fantasy_jax.preprocessing.boxes import parse_box
from fantasy_jax.preprocessing.text import byte_tokenizer
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import random_networks
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.inspect import store_paths
from fantasy_jax.weights.lora import parse_lora

OPTIONS = {
    FantasyTalkingPipeline: ("audio", "voice", "batch", "person", "box", "people"),
    FantasyDubbingPipeline: ("audio", "video", "mask", "background", "person", "box"),
    FantasyPortraitPipeline: ("driver", "sound", "overlay", "person", "box", "people"),
}
"""Options that not every pipeline has."""

REPLACED = {
    "latents": (
        *("calibrate", "image", "prompt", "seed", "noise", "save_latents", "voice", "batch", "person", "box"),
        *("driver", "overlay", "size", "lora", "previews"),
    ),
    "noise": ("seed",),
}
"""Options that have no effect with another one; those that say what is dubbed have one."""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and samples clips, or compiles the programs that would."""
    parser = sampling_parser(__doc__)
    ahead.add_arguments(parser)
    arguments, config = cli.parse(parser, argv)
    pipeline_type = _pipeline_type(config, arguments)
    model = section(ModelConfig, config, "model")
    video = section(VideoConfig, config, "video")
    if arguments.calibrate:
        _drop_approximations(config)
    settings = section(pipeline_type.config_type, config, "sample")
    piece = {"start": arguments.start, "max_seconds": arguments.seconds}
    if arguments.lora:
        piece["loras"] = tuple(map(parse_lora, arguments.lora))
    settings = replace(settings, **{name: x for name, x in piece.items() if x is not None})
    if ahead.is_requested(arguments, also=("size",)):
        if settings.eight_bit_products:
            raise ConfigError(
                "sample.eight_bit_products needs 8-bit weights, which --compile_only does not have; "
                "python -m fantasy_jax.performance.memory --compile_only compiles with them"
            )
        programs = partial(sampling_programs, model, settings, people=arguments.people or 1)
        return ahead.compile_and_report(arguments, video, settings.mesh, programs)
    if arguments.calibrate and arguments.video and settings.strength < 1:
        raise ConfigError(
            f"--calibrate measures all steps, but sample.strength is {settings.strength:g}, which leaves "
            "some out; set it to 1"
        )
    if arguments.preview_every and not arguments.previews:
        raise ConfigError("--preview_every has no effect without --previews")
    ahead.parse_size(arguments.size)  # an error now, rather than after the weights are read
    requests = _requests(arguments, pipeline_type)
    _check_files(arguments, config, requests, settings)
    keep_compiled_programs()
    pipeline = _pipeline(pipeline_type, config, arguments, model, video, settings)
    dubbed = pipeline_type is FantasyDubbingPipeline
    sample = _decode if arguments.latents and not dubbed else SAMPLERS[pipeline_type]
    pipeline.calibration = Calibration() if arguments.calibrate else None
    status = run_batch(requests, partial(sample, pipeline, arguments))
    if pipeline.calibration is not None:
        write_curve(pipeline.calibration.curve(settings.shift, settings.guidance), arguments.calibrate)
        print(f"Wrote {arguments.calibrate}: what --config.sample.magcache.curve takes")
    return status


def _drop_approximations(config: ConfigDict) -> None:
    """Drops the settings of approximations: exact steps are measured, and the curve need not exist yet."""
    if isinstance(sampling := config.get("sample"), ConfigDict):
        with sampling.unlocked():
            for name in {"gating", "magcache"} & set(sampling):
                del sampling[name]


def _check_files(
    arguments: argparse.Namespace,
    config: ConfigDict,
    requests: Sequence[ClipRequest],
    settings: PipelineConfig,
) -> None:
    """Checks all outputs before any work: none is an input, and each can be written as what its name says."""
    read = [*arguments.driver, *arguments.voice, *(x for r in requests for x in (r.image, *r.audio))]
    given = [arguments.batch, arguments.noise, arguments.latents, arguments.sound, arguments.background]
    used = [*cli.config_files(arguments.config, config), *store_paths(_weights(arguments, config))]
    used += [file.path for file in settings.loras]
    videos = [arguments.overlay, *(r.output for r in requests)]
    outputs = [arguments.save_latents, arguments.calibrate, arguments.overlay]
    if arguments.previews:
        outputs.append(Path(arguments.previews) / f"{requests[0].output.stem}_step_01.mp4")
    written = [*outputs, *(x for r in requests for x in r.outputs)]
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
    sound, config = {}, pipeline.config
    if played := [*request.audio, *filter(None, [arguments.sound])]:
        sounds = read_sounds(played, start=config.start, max_seconds=config.max_seconds)
        sound = {"audio": sounds.played, "audio_seconds": sounds.seconds, "audio_rate": sounds.rate}
    _write_clip(pipeline.decode(latents, num_frames, progress=True, **sound), arguments, request)


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
        **_sampling(arguments, request),
    )
    _write_clip(output, arguments, request)


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
        scene, prompt=arguments.prompt or "", sound=arguments.sound or None, **_sampling(arguments, request)
    )
    _write_clip(output, arguments, request)
    if output.audio is None:
        print("No driver has sound that can be read, and the video has none.")


def _dub(pipeline: FantasyDubbingPipeline, arguments: argparse.Namespace, request: ClipRequest) -> None:
    """Dubs a video and writes it."""
    if len(request.audio) > 1:
        raise ConfigError("--audio is given several times; --video takes one, the new speech")
    given = {} if arguments.prompt is None else {"prompt": arguments.prompt}
    if arguments.latents:
        channels = pipeline.networks.config.vae.latent_channels
        given["latents"], _ = read_latents(arguments.latents, channels)
    output = pipeline(
        request.image,
        request.audio[0],
        mask=arguments.mask or "mouth",
        people=arguments.person,
        boxes=[parse_box(text, option="--box") for text in arguments.box],
        background=arguments.background,
        report=print,
        **given,
        **_sampling(arguments, request),
    )
    _write(output, arguments, request, None, "video, sound, mask, people and config")
    source, (video, sheet) = output.plan.source, request.outputs
    print(
        f"Wrote {video}: {output.plan.num_frames} frames of {source.width} x {source.height} at "
        f"{float(output.fps):g} frames per second"
    )
    print(f"Wrote {sheet}: frames of the source, and below each the dubbed one")


SAMPLERS = {FantasyTalkingPipeline: _talk, FantasyDubbingPipeline: _dub, FantasyPortraitPipeline: _act}


def _pipeline_type(config: ConfigDict, arguments: argparse.Namespace) -> type[Pipeline]:
    """The pipeline of the config's task, or the one that dubs a video.

    Raises:
        ConfigError: There is no such task, or an option is given that the pipeline does not have.
    """
    pipeline_type, task = pipeline_of(config), f"the task {config.task} of {arguments.config}"
    refused: list[str] = []
    if pipeline_type is FantasyTalkingPipeline and arguments.video:
        pipeline_type, task = FantasyDubbingPipeline, "--video"
        refused = ["image", "noise", "size"]
    refused += [name for names in OPTIONS.values() for name in names if name not in OPTIONS[pipeline_type]]
    if given := [name for name in refused if getattr(arguments, name)]:
        raise ConfigError(f"--{given[0]} does not go with {task}")
    kept = OPTIONS[FantasyDubbingPipeline] if pipeline_type is FantasyDubbingPipeline else ()
    for option, names in REPLACED.items():
        if given := [
            name
            for name in names
            if getattr(arguments, option) and name not in kept and getattr(arguments, name) not in (None, [])
        ]:
            raise ConfigError(f"--{given[0]} has no effect with --{option}")
    return pipeline_type


def _sampling(arguments: argparse.Namespace, request: ClipRequest) -> dict[str, object]:
    """The arguments that every pipeline takes."""
    noise: Callable | None = partial(read_noise, arguments.noise) if arguments.noise else None
    given = {"seed": arguments.seed or 0, "noise": noise, "timed": cli.timed, "progress": True}
    if arguments.previews:
        files = PreviewFiles(Path(arguments.previews), request.output.stem, arguments.preview_every)
        given["callback_on_step_end"] = files
    return given


def _write_clip(output: VideoOutput, arguments: argparse.Namespace, request: ClipRequest) -> None:
    """Writes a generated clip, and says what it is."""
    _write(output, arguments, request, output.num_frames, "config and sound")
    size, (video, sheet) = f"{output.width} x {output.height}", request.outputs
    print(f"Wrote {video}: {output.num_frames} frames of {size} at {output.fps} frames per second")
    print(f"Wrote {sheet}: a contact sheet of its frames")


def _write(
    output: VideoOutput | DubbedVideo,
    arguments: argparse.Namespace,
    request: ClipRequest,
    num_frames: int | None,
    needed: str,
) -> None:
    """Writes a clip, its contact sheet and, where they are asked for or writing fails, its latents."""
    video, sheet = request.outputs
    if arguments.save_latents:
        with keep_latents(video, output.latents, num_frames, needed=needed):
            save_latents(arguments.save_latents, output.latents, num_frames)
        print(f"Wrote {arguments.save_latents}: the latents")
    saved = arguments.save_latents or arguments.latents
    saved = None if saved and is_stream(saved) else saved
    with (
        cli.timed("Latents to video"),
        keep_latents(video, output.latents, num_frames, saved=saved, needed=needed),
    ):
        output.save(video, sheet=sheet)


def _requests(arguments: argparse.Namespace, pipeline_type: type[Pipeline]) -> Sequence[ClipRequest]:
    """The clips of the command line: one, or those of a batch file."""
    shown = "video" if pipeline_type is FantasyDubbingPipeline else "image"
    needed = (shown, "driver" if pipeline_type is FantasyPortraitPipeline else "audio", "output")
    needed = ("output",) if arguments.latents and shown == "image" else needed
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
    for name in ("loras", "weights_memory", "eight_bit_products"):
        if getattr(settings, name) != getattr(PipelineConfig, name):
            raise ConfigError(f"sample.{name}: needs stored weights; --weights names a store")
    print("No weights given: they are random, and the video will be noise.")
    return pipeline_type(random_networks(model, byte_tokenizer()), video, settings)


if __name__ == "__main__":
    cli.run(main, "sample.py")
