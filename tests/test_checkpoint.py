"""Checkpoints that are damaged, disks that are full, and settings that change when a run is resumed."""

import errno
import json
import logging
import os
import shutil
from dataclasses import replace

import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_training import LOOP, MESH, line_task, saved_steps, weight

from fantasy_jax.config import as_json, differences
from fantasy_jax.disk import FullDiskError
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.lora import LoRAConfig
from fantasy_jax.sharding import MeshConfig
from fantasy_jax.training import checkpoint
from fantasy_jax.training.checkpoint import check_resumable
from fantasy_jax.training.checksums import CHECKSUMS, find_damage
from fantasy_jax.training.events import Events
from fantasy_jax.training.loop import LoopConfig, checkpoint_folder, train
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.stages import StagesConfig, stage_settings

EVERY_4 = replace(LOOP, save_every=4, keep_last=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints of steps 4, 8 and 12, and its weights."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, weight(train(line_task(kind="straight"), EVERY_4, folder, MESH))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run, in another place."""
    return shutil.copytree(finished[0], tmp_path / "run")


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, byte, bit=0):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def flip_values(path):
    """Makes the numbers in a file not a number, for most of their types."""
    path.write_bytes(b"\xff" * path.stat().st_size)


def test_a_copy_is_intact(run):
    assert [find_damage(checkpoint_folder(run) / step) for step in ("4", "8", "12")] == [None] * 3


def test_flipped_bits_are_found_anywhere(run):
    rng, checkpoint = np.random.default_rng(0), checkpoint_folder(run) / "12"
    places = files(checkpoint)
    assert {path.name for path in places} > {CHECKSUMS, "_METADATA", "metadata", "commit_success.txt"}
    for i in range(200):  # half of them in files chosen at random, the others in each file in turn
        path = places[i // 2 % len(places) if i % 2 else rng.integers(len(places))]
        content = path.read_bytes()
        flip(path, rng.integers(len(content)), rng.integers(8))
        assert find_damage(checkpoint) is not None, (path, i)
        path.write_bytes(content)
    assert find_damage(checkpoint) is None


DAMAGES = {
    "flipped": lambda path: flip(path, -1),
    "overwritten": flip_values,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


def largest(checkpoint):
    return max(files(checkpoint / "state/ocdbt.process_0"), key=lambda path: path.stat().st_size)


PLACES = {
    "array": largest,
    "about": lambda checkpoint: checkpoint / "about/metadata",
    "checksums": lambda checkpoint: checkpoint / CHECKSUMS,
}


@pytest.mark.parametrize(
    ("damage", "place"),
    [*((damage, "array") for damage in DAMAGES), ("emptied", "about"), ("deleted", "checksums")],
)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_is_used(
    finished, run, damage, place, caplog
):
    checkpoints = checkpoint_folder(run)
    DAMAGES[damage](PLACES[place](checkpoints / "12"))
    before = {path.relative_to(checkpoints / "12"): path.read_bytes() for path in files(checkpoints / "12")}
    learnt = weight(train(line_task(kind="straight"), EVERY_4, run, MESH))
    assert np.array_equal(learnt, finished[1])
    assert saved_steps(run) == {"4", "8", "12", "12.damaged"}
    aside = checkpoints / "12.damaged"
    assert {path.relative_to(aside): path.read_bytes() for path in files(aside)} == before
    told = [record.message for record in caplog.records if record.name == "fantasy_jax.training.checkpoint"]
    assert len(told) == 2
    assert str(checkpoints / "12") in told[0]
    assert "step 8" in told[1]


@pytest.mark.parametrize(
    ("item", "emptied"), [("about", False), ("about", True), ("state", False), (".", False), (".", True)]
)
def test_a_missing_or_empty_item_is_damage(run, item, emptied):
    folder = checkpoint_folder(run) / "12" / item
    shutil.rmtree(folder)
    if emptied:
        folder.mkdir()
    train(line_task(kind="straight"), EVERY_4, run, MESH)
    deleted = item == "." and not emptied
    assert saved_steps(run) == {"4", "8", "12"} | ({"12.damaged"} if not deleted else set())


def test_an_older_checkpoint_is_used_if_several_are_damaged(finished, run):
    for _ in range(2):  # the second time, names of folders that were put aside are in use
        for step in ("8", "12"):
            flip(checkpoint_folder(run) / step / "about/metadata", 3)
        assert np.array_equal(weight(train(line_task(kind="straight"), EVERY_4, run, MESH)), finished[1])
    aside = {"8.damaged", "12.damaged", "8.damaged2", "12.damaged2"}
    assert saved_steps(run) == {"4", "8", "12"} | aside


def test_config_error_if_no_checkpoint_is_intact(run):
    for step in ("4", "8", "12"):
        flip(checkpoint_folder(run) / step / "about/metadata", 3)
    for _ in range(2):  # the second time, too: nothing is trained from the start without being asked
        with pytest.raises(ConfigError, match="intact") as caught:
            train(line_task(kind="straight"), EVERY_4, run, MESH)
        assert str(checkpoint_folder(run)) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert saved_steps(run) == {"4.damaged", "8.damaged", "12.damaged"}


def test_a_finished_run_is_given_more_steps(finished, run, caplog):
    with caplog.at_level(logging.WARNING):
        learnt = weight(train(line_task(kind="straight", num_steps=16), EVERY_4, run, MESH))
    assert saved_steps(run) == {"8", "12", "16"}
    assert not np.array_equal(learnt, finished[1])
    assert json.loads((checkpoint_folder(run) / "16/about/metadata").read_text())["num_steps"] == 16
    (told,) = (record.message for record in caplog.records if record.name.startswith("fantasy_jax"))
    assert all(part in told for part in ("was 12", "now 16", "learning rate"))


def test_fewer_steps_than_are_done_leave_a_run_as_it_is(finished, run, caplog):
    learnt = weight(train(line_task(kind="straight", num_steps=10), EVERY_4, run, MESH))
    assert np.array_equal(learnt, finished[1])
    assert "nothing is left" in caplog.text


def test_logs_and_checkpoints_may_change(finished, run):
    loop = replace(LOOP, log_every=3, save_every=5, keep_last=1, sample_every=2, validate_every=3)
    assert np.array_equal(weight(train(line_task(kind="straight"), loop, run, MESH)), finished[1])


def test_config_error_names_a_setting_and_both_values(tmp_path):
    inner = {"rate": 0.1, "sizes": (1, 2)}
    train(line_task(train=inner, data="a"), LOOP, tmp_path, MESH)
    for changed, name, values in (
        ({"train": inner | {"rate": 0.2}, "data": "a"}, "train.rate", ("0.1", "0.2")),
        ({"train": inner | {"sizes": (1, 3)}, "data": "a"}, "train.sizes", ("[1, 2]", "[1, 3]")),
        ({"train": inner}, "data", ("'a'", "None")),
        ({"train": inner, "data": "a", "seed": 3}, "seed", ("None", "3")),
    ):
        with pytest.raises(ConfigError) as caught:
            check_resumable(checkpoint_folder(tmp_path), changed)
        assert all(part in str(caught.value) for part in (f"{name} ", *values, str(tmp_path)))


STAGES = StagesConfig()
FIRST, SECOND = STAGES.stages


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"stages": (FIRST, replace(SECOND, num_steps=7, remat_save_names=("products",)))}, []),
        ({"loop": LoopConfig(log_every=7, save_every=7, keep_last=7, num_workers=7, validate_every=7)}, []),
        ({"mesh": MeshConfig(fsdp=7)}, []),
        ({"stages": (replace(FIRST, num_steps=7), SECOND)}, ["train.stages.0.num_steps"]),
        ({"stages": (FIRST, replace(SECOND, batch_size=7))}, ["train.stages.1.batch_size"]),
        ({"loop": LoopConfig(seed=7)}, ["train.loop.seed"]),
        ({"lora": LoRAConfig(rank=7)}, ["train.lora.rank"]),
        (
            {"stages": (FIRST, replace(SECOND, optimizer=OptimizerConfig(learning_rate=0.7)))},
            ["train.stages.1.optimizer.learning_rate"],
        ),
    ],
)
def test_what_may_change_in_the_second_stage(changed, named):
    """A stage can be given more steps, but not one whose result the stage was begun with."""
    before, now = (stage_settings(config, {})[1] for config in (STAGES, replace(STAGES, **changed)))
    assert [name for name, _, _ in differences(as_json(before), as_json(now))] == named


def fail_after(function, count, error):
    """Wraps a function so that it raises an error from some call on."""
    calls = iter(range(count))

    def failing(*arguments, **options):
        if next(calls, None) is None:
            raise error
        return function(*arguments, **options)

    return failing


FULL = {
    "system": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "quota": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "quoted": ValueError('Error writing "x": [OS error 28: ENOSPC No space left on device]\nmore\nlines'),
}


@pytest.mark.parametrize(
    ("place", "error"), [*(("files", error) for error in FULL), ("events", "system"), ("checksums", "system")]
)
def test_a_full_disk_ends_training_in_one_line_and_the_same_command_goes_on(
    finished, tmp_path, place, error, monkeypatch, capfd
):
    owner, name, count = {
        "files": (ocp.JsonCheckpointHandler, "async_save", 2),
        "events": (Events, "scalars", 9),
        "checksums": (checkpoint, "write_checksums", 2),
    }[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_after(getattr(owner, name), count, FULL[error]))
        with pytest.raises(FullDiskError) as caught:
            train(line_task(kind="straight"), EVERY_4, tmp_path, MESH)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    assert find_damage(checkpoint_folder(tmp_path) / "8") is None
    assert "12" not in saved_steps(tmp_path)
    assert np.array_equal(weight(train(line_task(kind="straight"), EVERY_4, tmp_path, MESH)), finished[1])
    assert saved_steps(tmp_path) == {"4", "8", "12"}
