"""Trains the stages of a system on top of its converted weights, or the miniature from scratch."""

if __name__ == "__main__":
    from fantasy_jax.cli import exit_on_interrupt

    exit_on_interrupt("train.py")

from functools import partial
from pathlib import Path

from fantasy_jax import cli
from fantasy_jax.config import section
from fantasy_jax.disk import full_disk_reported
from fantasy_jax.errors import ConfigError
from fantasy_jax.miniature.synthetic import SyntheticConfig
from fantasy_jax.miniature.trainer import TRAININGS, MiniatureConfig, MiniatureTrainer
from fantasy_jax.performance import ahead
from fantasy_jax.performance.cache import keep_compiled_programs
from fantasy_jax.performance.programs import training_programs
from fantasy_jax.pipelines.tasks import pipeline_of
from fantasy_jax.sharding import init_distributed
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.training.finetune import finetune
from fantasy_jax.training.loop import lock_workdir
from fantasy_jax.video import VideoConfig

EXAMPLES = """\
examples:
  the miniature, from scratch:
  python train.py --config=configs/tiny.py --workdir=out/tiny
  python train.py --config=configs/tiny.py:quick --workdir=out/quick
  python train.py --config=configs/tiny.py --workdir=out/long --config.train.stages.1.num_steps=20000

  the audio adapter of the 14B model, from converted weights and encoded clips:
  python train.py --config=configs/fantasy_talking_14b.py --weights=weights/fantasy_talking_14b \\
      --records=records/encoded_clips/1.0.0 --workdir=out/audio
  all adapters and a LoRA of the base model:
  python train.py --config=configs/fantasy_talking_14b.py:lora --weights=weights/fantasy_talking_14b \\
      --records=records/encoded_clips/1.0.0 --workdir=out/lora
  the expression adapter of a portrait model, from clips of one person and of two or three, 3:1:
  python train.py --config=configs/fantasy_portrait_14b.py:adapters --weights=weights/fantasy_portrait_14b \\
      --records=one/encoded_clips/1.0.0 --records=several/encoded_clips/1.0.0 \\
      "--config.train.shares=(3.0, 1.0)" --workdir=out/portrait
  memory and time of a step on 64 chips, compiled for them on this machine; nothing is trained:
  python train.py --config=configs/fantasy_talking_14b.py --compile_only --topology=v5p:4x4x4

Ctrl-C saves, a second one ends at once; the same command resumes. To watch: tensorboard --logdir=out/tiny
Every setting of the config file can be given as --config.NAME=VALUE.
"""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and trains, or compiles."""
    arguments, config = cli.parse(_parser(), argv)
    pipeline = pipeline_of(config)
    config_type = TRAININGS[config.task]
    miniature = config_type is MiniatureConfig
    if arguments.distributed:
        if miniature:
            raise ConfigError(f"{arguments.config}: trains in one process; leave --distributed out")
        init_distributed()
    if miniature and (given := [name for name in ("records", "weights") if getattr(arguments, name)]):
        raise ConfigError(f"--{given[0]} has no effect with {arguments.config}, which makes its own clips")
    model = section(ModelConfig, config, "model")
    video = section(VideoConfig, config, "video")
    sampling = section(pipeline.config_type, config, "sample")
    training = section(config_type, config, "train")
    if ahead.is_requested(arguments):
        programs = partial(training_programs, model, training, people=arguments.people or 1)
        return ahead.compile_and_report(arguments, video, training.mesh, programs)
    if not arguments.workdir:
        raise ConfigError("--workdir is needed: the folder of checkpoints, logs and weights")
    if not miniature and not all(arguments.records or ("",)):
        raise ConfigError("--records is needed: the folder of the encoded clips")
    workdir = Path(arguments.workdir)
    settings = {"model": model, "video": video, "sampling": sampling, "config": training}
    settings["pipeline"] = pipeline.__name__
    if miniature:
        data = section(SyntheticConfig, config, "data")
        run = MiniatureTrainer(workdir, data=data, **settings).run
    else:
        store = Path(arguments.weights or config.weights)
        run = partial(finetune, store, list(map(Path, arguments.records)), workdir, **settings)
    keep_compiled_programs()
    with full_disk_reported(workdir), lock_workdir(workdir):
        weights = run()
    print(f"Wrote {weights}; sample from it with sample.py --config={arguments.config} --weights={weights}")
    return 0


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="train.py", description=__doc__, epilog=EXAMPLES)
    cli.add_config_argument(parser)
    parser.add_argument("--workdir", metavar="DIR", help="folder of data, checkpoints, logs and weights")
    parser.add_argument("--weights", metavar="DIR", help="store to start from (default: the config's)")
    parser.add_argument(
        "--records",
        metavar="DIR",
        action="append",
        default=[],
        help="encoded clips, unless the config makes its own; several times for several datasets, such as "
        "clips of one person and of two (--config.train.shares)",
    )
    parser.add_argument(
        "--people",
        metavar="N",
        type=cli.integer(1, 1024),
        help="people of the clip, for --compile_only",
    )
    parser.add_argument(
        "--distributed", action="store_true", help="run as one of several processes (docs/training.md)"
    )
    ahead.add_arguments(parser)
    return parser


if __name__ == "__main__":
    cli.run(main, "train.py")
