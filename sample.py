"""Makes a portrait talk: picture, speech and prompt in, mp4 out."""

from pathlib import Path

from fantasy_jax import cli, media
from fantasy_jax.config import build
from fantasy_jax.data.speech import SAMPLE_RATE, load_wav2vec2
from fantasy_jax.data.text import byte_tokenizer
from fantasy_jax.pipeline import ModelConfig, RandomNetworks, SampleConfig, generate

EXAMPLES = """\
examples:
  python sample.py --config=configs/tiny.py --image=portrait.png --audio=speech.wav --output=out/talk.mp4
  python sample.py --config=configs/tiny.py --image=portrait.jpg --audio=song.mp3 --prompt="A man sings." \\
      --output=out/song.mp4 --seed=7 --config.sample.steps=20 --config.sample.audio_scale=4.5

Every setting of the config file can be given as --config.NAME=VALUE.
"""


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and samples one clip."""
    parser = cli.ArgumentParser(prog="sample.py", description=__doc__, epilog=EXAMPLES)
    cli.add_config_argument(parser)
    parser.add_argument("--image", required=True, help="the portrait, in any common format")
    parser.add_argument("--audio", required=True, help="the speech: a sound file, or a video with sound")
    parser.add_argument(
        "--prompt", default="A person is talking.", help="what happens (default: %(default)s)"
    )
    parser.add_argument(
        "--output", required=True, help="the mp4 to write, and beside it a sheet of frames (.png)"
    )
    parser.add_argument("--wav2vec2", metavar="DIR", help="hear through this wav2vec2, as it is downloaded")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise (default: %(default)s)")
    arguments, config = cli.parse(parser, argv)

    model = build(ModelConfig, config.model, "model")
    settings = build(SampleConfig, config.sample, "sample")
    output = Path(arguments.output)
    sheet = output.with_suffix(".png")
    for path in (output, sheet):
        media.check_writable(path)
    speech_encoder = load_wav2vec2(arguments.wav2vec2) if arguments.wav2vec2 else None
    networks = RandomNetworks(model, byte_tokenizer(), speech_encoder=speech_encoder)
    with cli.phase("Picture and sound"):
        picture = media.read_picture(arguments.image)
        sound = media.read_sound(arguments.audio)
    print("No weights given: they are random, and the video will be noise.")
    video = generate(
        networks,
        settings,
        picture=picture,
        sound=sound,
        prompt=arguments.prompt,
        seed=arguments.seed,
        phase=cli.phase,
        progress=True,
    )
    with cli.phase("Video and sound to mp4"):
        media.write_video(output, video, settings.fps, sound=arguments.audio)
        media.write_contact_sheet(sheet, video, settings.fps)
    seconds, sound_seconds = len(video) / settings.fps, sound.size / SAMPLE_RATE
    if sound_seconds > seconds:
        print(f"The sound lasts {sound_seconds:.2f} s and is cut to the video's {seconds:.2f} s.")
    frames, height, width, _ = video.shape
    print(f"Wrote {output}: {frames} frames of {width} x {height} at {settings.fps} a second")
    print(f"Some of them are shown by {sheet}")


if __name__ == "__main__":
    cli.run(main, "sample.py")
