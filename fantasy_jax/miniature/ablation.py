r"""Ablation of FantasyPortrait's method in the miniature, as in table 3 of the paper.

Source: arXiv 2507.12956, section 4 (the arms) and section 3 (the parts).

All arms start from one checkpoint, the base, of what they have in common: the projected tokens alone, and
clips of one person. So no arm has ever been trained with what it is said to lack. For every seed, the base
can begin with the talking miniature's transformer (`train.initial`). In the workdir of the portrait's
training, and with the same initial store, clips, encoders and VAE are taken over:

    .venv/bin/python -m fantasy_jax.miniature.ablation --config=configs/tiny_portrait.py \
        --workdir=out/portrait --config.train.initial=fantasy_jax/assets/tiny

Below the folder of the transformer's training, `ablation/seed_N/` has the folders of base and arms, each with
checkpoints and logs. The same command resumes trainings, and measures all arms again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from fantasy_jax import cli
from fantasy_jax.config import PositiveInt, Settings, section
from fantasy_jax.convert.rules import assign, flat_parameters
from fantasy_jax.data.records import Record
from fantasy_jax.disk import full_disk_reported
from fantasy_jax.errors import ConfigError
from fantasy_jax.files import check_outputs
from fantasy_jax.miniature.clips import SyntheticConfig
from fantasy_jax.miniature.driven import DrivenClips
from fantasy_jax.miniature.held_out import Figure, figure, write_figures
from fantasy_jax.miniature.judge import Judge
from fantasy_jax.miniature.reenactment import (
    COLUMNS,
    Control,
    Reenactment,
    add_measuring_arguments,
    cells,
    drive,
    trained_judge,
)
from fantasy_jax.miniature.train_transformer import initial_networks
from fantasy_jax.miniature.trainer import MiniatureConfig, MiniatureTrainer
from fantasy_jax.models.face_encoder import FaceEncoder
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.performance.cache import keep_compiled_programs
from fantasy_jax.pipelines.config import PortraitSampleConfig
from fantasy_jax.pipelines.portrait import FantasyPortraitPipeline
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Networks
from fantasy_jax.training.loop import lock_workdir
from fantasy_jax.training.stages import train_stages
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.inspect import store_origins, store_paths
from fantasy_jax.weights.loading import stored_network

EXAMPLES = """\
examples:
  python -m fantasy_jax.miniature.ablation --config=configs/tiny_portrait.py --workdir=out/portrait \\
      --config.train.initial=fantasy_jax/assets/tiny --json=out/ablation.json
  three seeds, and the table of two arms only:
  python -m fantasy_jax.miniature.ablation --config=configs/tiny_portrait.py --workdir=out/portrait \\
      --config.train.initial=fantasy_jax/assets/tiny --seed=0 --seed=1 --seed=2 --only=full --only=no-mca
"""

Measured = dict[int, list[Control]]
"""Values of an arm by the number of people, one for each seed."""


@dataclass(frozen=True)
class AblationConfig(Settings):
    """Lengths of the trainings.

    Attributes:
        base_steps: Steps of the base.
        arm_steps: Further steps of each arm.
    """

    base_steps: PositiveInt = 2000
    arm_steps: PositiveInt = 1500


@dataclass(frozen=True)
class Arm:
    """A row of the table, as changes of the config.

    Attributes:
        title: What it is called in the table.
        adapter: Changes of `model.expression_adapter`.
        people: People in the clips of each dataset of its training; empty: those of the config.
        weights: The arm whose weights it takes; empty: its own, which are trained.
        change: Changes the encoded clips that are sampled.
        measured: The numbers of people in the clips that are measured.
    """

    title: str
    adapter: Mapping[str, Any] = field(default_factory=dict)
    people: tuple[int, ...] = ()
    weights: str = ""
    change: Callable[[Record], Record] = dict
    measured: tuple[int, ...] = (1, 2, 3)


def under_official_mask(clip: Record) -> Record:
    """An encoded clip of three people whose tokens attend to drivers as the official mask has it.

    Person 1 attends to drivers 1 and 2, person 2 to 1 and 3, person 3 to 2 and 3 (fantasy-portrait,
    `utils.py`, `infer_multi.py`). Every driver is there twice, which leaves the background as it is.
    """
    expression = clip["expression"][[0, 1, 0, 2, 1, 2]]
    return clip | {"expression": expression, "owners": np.int32([1, 1, 2, 2, 3, 3])}


_PROJECTED = {"mouth_queries": 0, "emotion_queries": 0}
BASE = Arm("base", adapter=_PROJECTED, people=(1,))
"""What all arms have in common."""
ARMS = {
    "full": Arm("full"),
    "no-eal": Arm("without expression-augmented learning", adapter=_PROJECTED),
    "eal-all": Arm(
        "expression-augmented learning of all features", adapter={"head_queries": 4, "eye_queries": 4}
    ),
    "no-mca": Arm("without masked attention", adapter={"masked": False}),
    "no-med": Arm("without clips of several people", people=(1,)),
    "official-mask": Arm("official mask", weights="full", change=under_official_mask, measured=(3,)),
}
"""The rows of the table by name. The paper's MED, its multi-person data, is here clips of two people."""
_REFERENCE = "full"
"""The arm that others are compared with."""


class Ablation:
    """Trains and measures arms, for one seed after another."""

    def __init__(self, trainer: MiniatureTrainer, config: AblationConfig):
        """Makes what all arms are trained on, unless it is there.

        Args:
            trainer: The portrait's training, on clips of one person among others.
            config: Lengths of the trainings.

        Raises:
            ConfigError: The workdir holds a part that was made with other settings.
        """
        self.trainer, self.config = trainer, config
        self.networks, self._encoded = trainer.prepare()

    def run(
        self,
        names: Sequence[str],
        seeds: Sequence[int],
        measure: Callable[[Arm, Networks, WanTransformer], dict[int, Control]],
    ) -> Iterator[dict[str, Measured]]:
        """Trains and measures arms, or takes over what has been trained.

        Args:
            names: Which of `ARMS`.
            seeds: Seeds of initial weights and training; clips and encoders remain.
            measure: Returns the values of an arm by the number of people.

        Yields:
            The values so far, after each arm.
        """
        results: dict[str, Measured] = {name: {} for name in names}
        for seed in seeds:
            base = self._train(BASE, "base", seed, self.config.base_steps)
            trained: dict[str, WanTransformer] = {}
            for name in names:
                source = ARMS[name].weights or name
                if source not in trained:
                    trained[source] = self._train(ARMS[source], source, seed, self.config.arm_steps, base)
                with cli.timed(f"{name}, seed {seed}"):
                    for people, control in measure(ARMS[name], self.networks, trained[source]).items():
                        results[name].setdefault(people, []).append(control)
                yield results

    def _train(
        self, arm: Arm, name: str, seed: int, steps: int, base: WanTransformer | None = None
    ) -> WanTransformer:
        """Trains an arm from the base, or the base from its initial weights."""
        trainer = self.trainer
        config, model = trainer.config, arm_model(trainer.model, arm)
        people = arm.people or config.people
        stage = replace(config.stages[0], num_steps=steps)
        # An arm does not see the batches and the noise of the base again.
        drawn = seed if base is None else int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])
        loop = replace(config.loop, seed=drawn, sample_every=0)
        shares = config.shares if people == config.people else ()
        lengths = {"base_steps": self.config.base_steps}
        if base is not None:
            lengths["arm_steps"] = steps
        stages = train_stages(
            self.networks.replace(transformer=initial(model, seed, base=base, stored=trainer.stored)),
            [self._encoded[count] for count in people],
            trainer.folder / "ablation" / f"seed_{seed}" / name,
            mesh=trainer.mesh,
            fps=trainer.video.fps,
            sampling=trainer.sampling,
            config=replace(config, stages=(stage,), shares=shares, loop=loop),
            settings=trainer.transformer_settings(*people) | {"model": model, "ablation": lengths},
        )
        ((_, transformer),) = stages
        return transformer


def arm_model(model: ModelConfig, arm: Arm) -> ModelConfig:
    """The sizes of an arm's networks."""
    return model.replace(expression_adapter=replace(model.expression_adapter, **arm.adapter))


def initial(
    model: ModelConfig, seed: int, *, base: WanTransformer | None = None, stored: Networks | None = None
) -> WanTransformer:
    """A transformer as an arm's training begins with it.

    Args:
        model: Sizes.
        seed: Seed of random weights.
        base: Transformer whose parameters it has where their names are equal.
        stored: Networks of the initial store.
    """
    transformer = initial_networks(model, seed=seed, stored=stored)["transformer"]
    if base is not None:
        assign(transformer, flat_parameters(transformer) | flat_parameters(base))
    return transformer


def combine(controls: Sequence[Control]) -> dict[str, dict[str, float]]:
    """Figures of several seeds.

    Returns:
        By field of `Control`: the `mean` over seeds, the standard error over `clips`, which is the mean of
        the seeds', and that over `seeds`, 0 for one seed.
    """
    combined = {}
    for each in fields(Control):
        by_seed = [figure(getattr(control, each.name)) for control in controls]
        over_seeds = figure([x.mean for x in by_seed])
        combined[each.name] = {
            "mean": over_seeds.mean,
            "clips": float(np.mean([x.standard_error for x in by_seed])),
            "seeds": over_seeds.standard_error,
        }
    return combined


def differences(results: Mapping[str, Measured]) -> dict[str, Measured]:
    """The differences of the other arms to `full`, clip by clip and seed by seed, as far as it is measured.

    Clips differ more from each other than arms do on the same clip, so the standard errors are smaller.
    """
    found: dict[str, Measured] = {}
    for people, reference in results.get(_REFERENCE, {}).items():
        for name, measured in results.items():
            if name != _REFERENCE and people in measured:
                pairs = zip(measured[people], reference, strict=False)
                found.setdefault(name, {})[people] = [one.minus(other) for one, other in pairs]
    return found


def table(results: Mapping[str, Measured]) -> str:
    """The arms as a table: means, standard errors over clips and, of several seeds, over seeds."""
    return cli.markdown_table(
        ("arm", "people", *COLUMNS.values()), _rows(results), numbers=("people", *COLUMNS.values())
    )


def _rows(results: Mapping[str, Measured]) -> Iterator[list[str]]:
    for people in sorted({people for measured in results.values() for people in measured}):
        for name, measured in results.items():
            if people in measured:
                errors = ("clips", "seeds") if len(measured[people]) > 1 else ("clips",)
                combined = combine(measured[people])
                values = {each: [x["mean"], *(x[error] for error in errors)] for each, x in combined.items()}
                yield [ARMS[name].title, str(people), *cells(values)]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.miniature.ablation",
        description="Trains the portrait miniature with and without parts of its method, and compares.",
        epilog=EXAMPLES,
    )
    cli.add_config_argument(parser)
    add_measuring_arguments(parser)
    parser.add_argument(
        "--only",
        action="append",
        choices=ARMS,
        metavar="ARM",
        help=f"arm that is trained and measured, of {', '.join(ARMS)}; may be repeated (default: all)",
    )
    parser.add_argument(
        "--clips", type=cli.integer(2), default=64, metavar="N", help="clips that are measured (default: 64)"
    )
    parser.add_argument(
        "--seed",
        type=cli.integer(0, 2**32 - 1),
        action="append",
        metavar="N",
        help="seed of the initial weights and of the training; may be repeated (default: 0)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    arguments, config = cli.parse(parser, argv)
    names = list(dict.fromkeys(arguments.only or _measured_arms(arguments.people)))
    if unmeasured := set(names) - set(_measured_arms(arguments.people)):
        raise ConfigError(
            f"--only={sorted(unmeasured)[0]}: is not measured with the numbers of people of --people"
        )
    seeds = list(dict.fromkeys(arguments.seed or [0]))
    workdir = Path(arguments.workdir)
    trainer = _trainer(workdir, config)
    stores = [arguments.faces, *filter(None, [trainer.config.initial])]
    read = [*cli.config_files(arguments.config, config), *(x for store in stores for x in store_paths(store))]
    check_outputs([arguments.json], read)
    if "no-med" in names and trainer.config.people == ARMS["no-med"].people:
        raise ConfigError("train.people: no clips have several people; leave out the arm no-med (--only)")
    face_encoder = stored_network(arguments.faces, "face_encoder")
    keep_compiled_programs()
    results: dict[str, Measured] = {}
    with full_disk_reported(workdir), lock_workdir(workdir):
        ablation = Ablation(trainer, section(AblationConfig, config, "ablation"))
        measure = _Measurement(arguments, config, (trained_judge(workdir, config), face_encoder))
        for results in ablation.run(names, seeds, measure):
            if arguments.json:
                write_figures(_figures(results), arguments.json)
    print(table(results))
    if compared := differences(results):
        print(f"\nMinus {_REFERENCE}, clip by clip:\n\n{table(compared)}")
    print("After +-: the standard error over clips" + (", and that over seeds" if len(seeds) > 1 else ""))


def _figures(results: Mapping[str, Measured]) -> dict[str, Any]:
    """The figures of arms and of their differences, by arm and people, one for each seed."""

    def each(of: Mapping[str, Measured]) -> dict[str, dict[int, list[dict[str, Figure]]]]:
        return {
            name: {people: [x.figures() for x in controls] for people, controls in measured.items()}
            for name, measured in of.items()
        }

    return {"arms": each(results), f"minus_{_REFERENCE}": each(differences(results))}


def _measured_arms(people: Sequence[int] | None) -> list[str]:
    """The arms of which any of these numbers of people, or of all, is measured."""
    return [name for name, arm in ARMS.items() if set(arm.measured) & set(people or arm.measured)]


def _trainer(workdir: Path, config: Any) -> MiniatureTrainer:
    model = section(ModelConfig, config, "model")
    if "expression_adapter" not in model.networks:
        raise ConfigError("model.expression_adapter: is missing; the ablation is of portraits")
    training = section(MiniatureConfig, config, "train")
    if 1 not in training.people:
        raise ConfigError(f"train.people is {training.people}; the base is trained on clips of 1 person")
    if len(training.stages) != 1:
        raise ConfigError(f"train.stages: there are {len(training.stages)}; arms are trained in one")
    if training.initial and "expression_adapter" in store_origins(training.initial):
        raise ConfigError(
            f"train.initial: the transformer in {training.initial} was trained with what arms are without; "
            "name a store of the talking miniature"
        )
    return MiniatureTrainer(
        workdir,
        pipeline=FantasyPortraitPipeline.__name__,
        data=section(SyntheticConfig, config, "data"),
        video=section(VideoConfig, config, "video"),
        model=model,
        sampling=section(PortraitSampleConfig, config, "sample"),
        config=training,
    )


class _Measurement:
    """Measures arms; clips are made for the first and kept for all."""

    def __init__(self, arguments: Any, config: Any, tools: tuple[Judge, FaceEncoder]):
        self._arguments, self._config, self._tools = arguments, config, tools
        self._made: dict[int, tuple[DrivenClips, Reenactment]] = {}

    def __call__(self, arm: Arm, networks: Networks, transformer: WanTransformer) -> dict[int, Control]:
        measured = {}
        for people in sorted(set(arm.measured) & set(self._arguments.people or arm.measured)):
            if people not in self._made:
                self._made[people] = drive(
                    networks, self._config, self._tools, people=people, count=self._arguments.clips
                )
            clips, reenactment = self._made[people]
            examples = [arm.change(clip) for clip in clips.encoded]
            videos = clips.by(transformer).generate(examples, f"{arm.title}, {people}")
            measured[people] = reenactment.measure(videos)
        return measured


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.miniature.ablation")
