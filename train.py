"""Trains the miniature from nothing: clips, VAE, both stages of the transformer, weights to sample from."""

from pathlib import Path

from fantasy_jax import cli
from fantasy_jax.config import build
from fantasy_jax.data.synthetic import SyntheticConfig
from fantasy_jax.pipeline import ModelConfig, SampleConfig
from fantasy_jax.training.course import Course, TrainConfig

EXAMPLES = """\
examples:
  python train.py --config=configs/tiny.py --workdir=out/tiny
  python train.py --config=configs/tiny.py:quick --workdir=out/quick
  python train.py --config=configs/tiny.py --workdir=out/long --config.train.frame_stage.steps=20000

Ctrl-C saves; the same command goes on from there. To watch: tensorboard --logdir=out/tiny
Every setting of the config file can be given as --config.NAME=VALUE.
"""


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and runs the course."""
    parser = cli.ArgumentParser(prog="train.py", description=__doc__, epilog=EXAMPLES)
    cli.add_config_argument(parser)
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="where data, checkpoints, logs and weights go"
    )
    arguments, config = cli.parse(parser, argv)
    course = Course(
        Path(arguments.workdir),
        data=build(SyntheticConfig, config.data, "data"),
        model=build(ModelConfig, config.model, "model"),
        sampling=build(SampleConfig, config.sample, "sample"),
        config=build(TrainConfig, config.train, "train"),
    )
    weights = course.run()
    print(f"Wrote {weights}; sample from it with sample.py --config={arguments.config} --weights={weights}")


if __name__ == "__main__":
    cli.run(main, "train.py")
