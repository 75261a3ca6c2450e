"""Trains: the miniature from nothing, or the stages of a larger system on top of its converted weights."""

from functools import partial
from pathlib import Path

from fantasy_jax import cli
from fantasy_jax.config import ConfigError, build
from fantasy_jax.data.synthetic import SyntheticConfig
from fantasy_jax.performance import ahead
from fantasy_jax.performance.programs import training_steps
from fantasy_jax.pipeline import ModelConfig, SampleConfig
from fantasy_jax.sharding import join_processes
from fantasy_jax.training.course import Course, TrainConfig
from fantasy_jax.training.finetune import finetune
from fantasy_jax.training.stages import StagesConfig

EXAMPLES = """\
examples:
  python train.py --config=configs/tiny.py --workdir=out/tiny
  python train.py --config=configs/tiny.py:quick --workdir=out/quick
  python train.py --config=configs/tiny.py --workdir=out/long --config.train.frame_stage.steps=20000

  adapters of the 14B model, from the weights that `convert_weights.py import` made and encoded clips:
  python train.py --config=configs/fantasy_talking_14b.py --weights=weights/fantasy_talking_14b \\
      --records=records/encoded_clips/1.0.0 --workdir=out/adapters
  all adapters and a LoRA of the base:
  python train.py --config=configs/fantasy_talking_14b.py:lora --weights=weights/fantasy_talking_14b \\
      --records=records/encoded_clips/1.0.0 --workdir=out/lora
  what a step of it would need on 64 chips, compiled for them on this machine; nothing is trained:
  python train.py --config=configs/fantasy_talking_14b.py --compile_only --topology=v5p:4x4x4

Ctrl-C saves; the same command goes on from there. To watch: tensorboard --logdir=out/tiny
Every setting of the config file can be given as --config.NAME=VALUE.
"""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and trains, or compiles."""
    arguments, config = cli.parse(_parser(), argv)
    from_nothing = "data" in config
    if arguments.distributed:
        if from_nothing:
            raise ConfigError(f"{arguments.config}: is trained by one process; leave --distributed out")
        join_processes()
    model = build(ModelConfig, config.model, "model")
    sampling = build(SampleConfig, config.sample, "sample")
    training = build(TrainConfig if from_nothing else StagesConfig, config.train, "train")
    if arguments.compile_only:
        steps = partial(training_steps, model, sampling, training)
        return ahead.compile_only(arguments, sampling.longest_edge, training.mesh, steps)
    if not arguments.workdir:
        raise ConfigError("--workdir is needed: where checkpoints, logs and weights go")
    workdir = Path(arguments.workdir)
    if from_nothing:
        data = build(SyntheticConfig, config.data, "data")
        weights = Course(workdir, data=data, model=model, sampling=sampling, config=training).run()
    else:
        if not arguments.records:
            raise ConfigError("--records is needed: the folder of the encoded clips")
        store = Path(arguments.weights or config.weights)
        weights = finetune(
            store, Path(arguments.records), workdir, model=model, sampling=sampling, config=training
        )
    print(f"Wrote {weights}; sample from it with sample.py --config={arguments.config} --weights={weights}")
    return 0


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="train.py", description=__doc__, epilog=EXAMPLES)
    cli.add_config_argument(parser)
    parser.add_argument("--workdir", metavar="DIR", help="where data, checkpoints, logs and weights go")
    parser.add_argument("--weights", metavar="DIR", help="the store to start from (default: the config's)")
    parser.add_argument(
        "--records", metavar="DIR", help="encoded clips, for a configuration that makes none of its own"
    )
    parser.add_argument(
        "--distributed", action="store_true", help="be one of several processes; the README says how to start"
    )
    ahead.add_arguments(parser)
    return parser


if __name__ == "__main__":
    cli.run(main, "train.py")
