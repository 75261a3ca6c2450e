"""Makes portraits talk: image, speech and prompt in, mp4 out; one clip, or a row each of a CSV file."""

import argparse
from functools import partial
from pathlib import Path

from fantasy_jax import cli, media
from fantasy_jax.config import build
from fantasy_jax.errors import ConfigError
from fantasy_jax.files import check_writable
from fantasy_jax.performance import ahead
from fantasy_jax.performance.programs import sampling_programs
from fantasy_jax.pipelines.batch import ClipRequest, read_batch, run_batch
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.pipelines.latents import read_noise, save_latents
from fantasy_jax.pipelines.talking import FantasyTalkingPipeline
from fantasy_jax.preprocessing.text import byte_tokenizer
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import random_networks
from fantasy_jax.video import VideoConfig

PROMPT = "A person is talking."
EXAMPLES = """\
examples:
  python sample.py --config=configs/tiny.py --image=portrait.png --audio=speech.wav --output=out/talk.mp4
  python sample.py --config=configs/tiny.py --image=portrait.jpg --audio=song.mp3 --prompt="A man sings." \\
      --output=out/song.mp4 --seed=7 --config.sample.num_inference_steps=20
  several clips with one start; pairs.csv has the columns image, audio, prompt and output:
  python sample.py --config=configs/tiny.py --batch=pairs.csv
  with a motion adapter, a face that hardly moves on a lively body (0.5 is usual):
  python sample.py --config=configs/tiny.py --image=portrait.png --audio=speech.wav --output=out/talk.mp4 \\
      --config.sample.face_motion=0.1 --config.sample.body_motion=0.9

  The 14B model, with weights from `convert_weights.py import --output=weights/fantasy_talking_14b`:
  python sample.py --config=configs/fantasy_talking_14b.py --weights=weights/fantasy_talking_14b \\
      --image=woman.png --audio=woman.wav --prompt="A woman is talking." --output=out/woman.mp4
  from PyTorch's noise, with the latents saved for comparison:
  python sample.py --config=configs/fantasy_talking_14b.py --weights=weights/fantasy_talking_14b \\
      --image=woman.png --audio=woman.wav --prompt="A woman is talking." --output=out/woman.mp4 \\
      --noise=noise.safetensors --save_latents=out/latents.safetensors
  the same path with small random weights:
  python sample.py --config=configs/fantasy_talking_14b.py:debug --image=woman.png --audio=woman.wav \\
      --output=out/debug.mp4
  memory and time of each network on eight chips, compiled for them on this machine; nothing is sampled:
  python sample.py --config=configs/fantasy_talking_14b.py --compile_only --topology=v6e:2x4 \\
      --config.sample.mesh.context=2 --config.sample.mesh.tensor=4

Every setting of the config file can be given as --config.NAME=VALUE.
"""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and samples clips, or compiles the programs that would."""
    arguments, config = cli.parse(_parser(), argv)
    model = build(ModelConfig, config.model, "model")
    video = build(VideoConfig, config.video, "video")
    settings = build(SampleConfig, config.sample, "sample")
    if arguments.compile_only:
        programs = partial(sampling_programs, model, settings)
        return ahead.compile_and_report(arguments, video, settings.mesh, programs)
    requests = _requests(arguments)
    for path in (arguments.save_latents, *(x for request in requests for x in request.outputs)):
        if path:
            check_writable(path)
    weights = config.get("weights", "") if arguments.weights is None else arguments.weights
    pipeline = _pipeline(weights, model, video, settings)
    if not weights:
        print("No weights given: they are random, and the video will be noise.")
    return run_batch(requests, partial(_sample, pipeline, arguments))


def _sample(pipeline: FantasyTalkingPipeline, arguments: argparse.Namespace, request: ClipRequest) -> None:
    """Samples one clip and writes it."""
    output = pipeline(
        request.image,
        request.audio,
        request.prompt or arguments.prompt,
        seed=arguments.seed,
        noise=partial(read_noise, arguments.noise) if arguments.noise else None,
        timed=cli.timed,
        progress=True,
    )
    if arguments.save_latents:
        save_latents(arguments.save_latents, output.latents)
        print(f"Wrote {arguments.save_latents}: the latents")
    video, sheet = request.outputs
    with cli.timed("Video and audio to mp4"):
        output.save(video)
        media.write_contact_sheet(sheet, output.frames, output.fps)
    if output.audio_seconds > output.seconds:
        print(
            f"The audio lasts {output.audio_seconds:.2f} s and is cut to the video's {output.seconds:.2f} s."
        )
    frames, height, width, _ = output.frames.shape
    print(f"Wrote {video}: {frames} frames of {width} x {height} at {output.fps} frames per second")
    print(f"Wrote {sheet}: a contact sheet of its frames")


def _requests(arguments: argparse.Namespace) -> list[ClipRequest]:
    """The clips of the command line: one, or those of a batch file."""
    single = {name: getattr(arguments, name) for name in ("image", "audio", "output")}
    if arguments.batch:
        single |= {name: getattr(arguments, name) for name in ("noise", "save_latents")}
        if given := [name for name, value in single.items() if value]:
            raise ConfigError(f"--{given[0]} does not go with --batch, whose rows name their files")
        return read_batch(arguments.batch)
    for name, value in single.items():
        if not value:
            raise ConfigError(f"--{name} is needed; sample.py --help shows examples")
    return [ClipRequest(arguments.image, arguments.audio, "", Path(arguments.output))]


def _pipeline(
    weights: str, model: ModelConfig, video: VideoConfig, settings: SampleConfig
) -> FantasyTalkingPipeline:
    """A pipeline with the weights of a store, or with random ones."""
    if not weights:
        return FantasyTalkingPipeline(random_networks(model, byte_tokenizer()), video, settings)
    return FantasyTalkingPipeline.from_pretrained(
        weights, model=model, video=video, config=settings, keep=settings.keep
    )


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="sample.py", description=__doc__, epilog=EXAMPLES)
    cli.add_config_argument(parser)
    parser.add_argument("--image", help="the portrait, in any common format")
    parser.add_argument("--audio", help="the speech: an audio file, or a video with audio")
    parser.add_argument("--prompt", default=PROMPT, help="what the video shows (default: %(default)s)")
    parser.add_argument("--output", help="the mp4 to write, and beside it a contact sheet (.png)")
    parser.add_argument(
        "--batch",
        metavar="FILE",
        help="a CSV file with the columns image, audio, prompt and output, a clip in each row",
    )
    parser.add_argument(
        "--weights",
        metavar="DIR",
        help="the store of weights (default: the config's; with '' they are random)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the initial noise (default: %(default)s)"
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
    ahead.add_arguments(parser)
    return parser


if __name__ == "__main__":
    cli.run(main, "sample.py")
