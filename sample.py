"""Makes a portrait talk: picture, speech and prompt in, mp4 out."""

import argparse
from functools import partial
from pathlib import Path

from fantasy_jax import cli, media
from fantasy_jax.config import ConfigError, build
from fantasy_jax.data.speech import SAMPLE_RATE, load_wav2vec2
from fantasy_jax.data.text import byte_tokenizer, load_tokenizer
from fantasy_jax.performance import ahead
from fantasy_jax.performance.programs import sampling_programs
from fantasy_jax.pipeline import (
    ModelConfig,
    Networks,
    RandomNetworks,
    SampleConfig,
    decode_latents,
    generate_latents,
    latent_shape,
    read_noise,
    save_latents,
    starting_noise,
)
from fantasy_jax.weights import StoredNetworks

EXAMPLES = """\
examples:
  python sample.py --config=configs/tiny.py --image=portrait.png --audio=speech.wav --output=out/talk.mp4
  python sample.py --config=configs/tiny.py --image=portrait.jpg --audio=song.mp3 --prompt="A man sings." \\
      --output=out/song.mp4 --seed=7 --config.sample.steps=20 --config.sample.audio_scale=4.5
  with a motion adapter, a face that hardly moves on a lively body (0.5 is usual):
  python sample.py --config=configs/tiny.py --image=portrait.png --audio=speech.wav --output=out/talk.mp4 \\
      --config.sample.face_motion=0.1 --config.sample.body_motion=0.9

  The 14B model, its weights as `convert_weights.py import --output=weights/fantasy_talking_14b` writes them:
  python sample.py --config=configs/fantasy_talking_14b.py --weights=weights/fantasy_talking_14b \\
      --image=woman.png --audio=woman.wav --prompt="A woman is talking." --output=out/woman.mp4
  the same from PyTorch's noise, latents kept for comparison; and its path with small random weights:
  python sample.py --config=configs/fantasy_talking_14b.py --weights=weights/fantasy_talking_14b \\
      --image=woman.png --audio=woman.wav --prompt="A woman is talking." --output=out/woman.mp4 \\
      --noise=noise.safetensors --save_latents=out/latents.safetensors
  python sample.py --config=configs/fantasy_talking_14b.py:debug --image=woman.png --audio=woman.wav \\
      --output=out/debug.mp4
  what each network would need on eight chips, compiled for them on this machine; nothing is sampled:
  python sample.py --config=configs/fantasy_talking_14b.py --compile_only --topology=v6e:2x4 \\
      --config.sample.mesh.context=2 --config.sample.mesh.tensor=4

Every setting of the config file can be given as --config.NAME=VALUE.
"""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and samples one clip, or compiles what would."""
    arguments, config = cli.parse(_parser(), argv)
    model = build(ModelConfig, config.model, "model")
    settings = build(SampleConfig, config.sample, "sample")
    if arguments.compile_only:
        programs = partial(sampling_programs, model, settings)
        return ahead.compile_only(arguments, settings.longest_edge, settings.mesh, programs)
    for name in ("image", "audio", "output"):
        if not getattr(arguments, name):
            raise ConfigError(f"--{name} is needed; sample.py --help explains")
    output = Path(arguments.output)
    sheet = output.with_suffix(".png")
    for path in (output, sheet, arguments.save_latents):
        if path:
            media.check_writable(path)
    weights = config.get("weights", "") if arguments.weights is None else arguments.weights
    networks = _networks(arguments, model, weights, merge_lora=settings.merge_lora)
    with cli.phase("Picture and sound"):
        picture = media.read_picture(arguments.image)
        sound = media.read_sound(arguments.audio)
        shape = latent_shape(picture, sound, settings, model.vae.latent_channels)
        noise = (
            read_noise(arguments.noise, shape) if arguments.noise else starting_noise(arguments.seed, shape)
        )
    if not weights:
        print("No weights given: they are random, and the video will be noise.")
    latents = generate_latents(
        networks,
        settings,
        picture=picture,
        sound=sound,
        prompt=arguments.prompt,
        noise=noise,
        phase=cli.phase,
        progress=True,
    )
    if arguments.save_latents:
        save_latents(arguments.save_latents, latents)
        print(f"Wrote {arguments.save_latents}: the latents")
    with cli.phase("Latents to video"):
        video = decode_latents(networks, latents, settings, progress=True)
    with cli.phase("Video and sound to mp4"):
        media.write_video(output, video, settings.fps, sound=arguments.audio)
        media.write_contact_sheet(sheet, video, settings.fps)
    seconds, sound_seconds = len(video) / settings.fps, sound.size / SAMPLE_RATE
    if sound_seconds > seconds:
        print(f"The sound lasts {sound_seconds:.2f} s and is cut to the video's {seconds:.2f} s.")
    frames, height, width, _ = video.shape
    print(f"Wrote {output}: {frames} frames of {width} x {height} at {settings.fps} a second")
    print(f"Some of them are shown by {sheet}")
    return 0


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="sample.py", description=__doc__, epilog=EXAMPLES)
    cli.add_config_argument(parser)
    parser.add_argument("--image", help="the portrait, in any common format")
    parser.add_argument("--audio", help="the speech: a sound file, or a video with sound")
    parser.add_argument(
        "--prompt", default="A person is talking.", help="what happens (default: %(default)s)"
    )
    parser.add_argument("--output", help="the mp4 to write, and beside it a sheet of frames (.png)")
    parser.add_argument(
        "--weights",
        metavar="DIR",
        help="the folder of weights (default: the config's; with '' they are random)",
    )
    parser.add_argument("--wav2vec2", metavar="DIR", help="hear through this wav2vec2, as it is downloaded")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="split the prompt by this tokenizer, as it is downloaded"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise (default: %(default)s)")
    parser.add_argument(
        "--noise",
        metavar="FILE",
        help="start from the tensor `noise` in this safetensors file, [1, C, F, h, w], in place of a seed's",
    )
    parser.add_argument(
        "--save_latents",
        metavar="FILE",
        help="write the final latents as a safetensors file: the tensor `latents`, laid out likewise",
    )
    ahead.add_arguments(parser)
    return parser


def _networks(
    arguments: argparse.Namespace, model: ModelConfig, weights: str, *, merge_lora: bool
) -> Networks:
    """Networks with the weights of a folder, or random ones."""
    if weights:
        for name in ("wav2vec2", "tokenizer"):
            if getattr(arguments, name):
                raise ConfigError(
                    f"--{name} goes with random weights (--weights=''); {weights} has its own; leave it out"
                )
        return StoredNetworks(Path(weights), model, merge_lora=merge_lora)
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else byte_tokenizer()
    speech_encoder = load_wav2vec2(arguments.wav2vec2) if arguments.wav2vec2 else None
    return RandomNetworks(model, tokenizer, speech_encoder=speech_encoder)


if __name__ == "__main__":
    cli.run(main, "sample.py")
