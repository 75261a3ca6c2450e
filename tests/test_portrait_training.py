"""Training of portraits: whose expression matters to the loss, encoded people, and a run on two datasets."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import nnx
from helpers import TINY_EXPRESSION, TINY_WAN, abstract, normal, small_networks, tiny_transformer
from PIL import Image

import train
from configs.fantasy_portrait_14b import small_model
from fantasy_jax.data.encoded import batch_spec, encode_dataset, encode_people
from fantasy_jax.data.records import open_split, write_dataset
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.adapters.expression import ExpressionAdapter
from fantasy_jax.pipelines.config import PortraitSampleConfig, read_pipeline
from fantasy_jax.pipelines.scene import Driver, Scene
from fantasy_jax.preprocessing.driving import ALIGNED_POINTS, DrivingFace
from fantasy_jax.system.conditioning import condition
from fantasy_jax.system.encoders import encode_motion
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.registry import component_of
from fantasy_jax.training.objective import StageConfig, check_inputs, draw_kept, velocity_objective
from fantasy_jax.training.state import Trainer
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.store import record_hashes, save_network

STAGE = StageConfig(dropout=0.0, timesteps="logit_normal")
FRAMES, ROWS, COLUMNS, CLIPS = 3, 4, 6, 2
TOKENS = ROWS * COLUMNS // 4


@pytest.fixture(scope="module")
def transformer():
    """With one block, in which what video tokens attend to reaches no other video token."""
    resampler = replace(TINY_EXPRESSION.resampler, depth=1)
    adapter = abstract(ExpressionAdapter, replace(TINY_EXPRESSION, resampler=resampler, num_layers=1))
    return tiny_transformer(replace(TINY_WAN, num_layers=1), expression=adapter)


def make_batch():
    """Clips of two people, and of a third one who is padding."""
    latents = normal(CLIPS, FRAMES, ROWS, COLUMNS, TINY_WAN.latent_channels)
    labels = np.random.default_rng(0).integers(0, 3, (CLIPS, FRAMES, TOKENS), np.int32)
    return {
        "latents": latents,
        "first_frame": latents[::-1],
        "text": normal(CLIPS, TINY_WAN.text_length, TINY_WAN.text_dim, seed=1),
        "image": normal(CLIPS, 9, TINY_WAN.image_dim, seed=2),
        "expression": normal(CLIPS, 3, 4 * FRAMES - 3, TINY_EXPRESSION.feature_width, seed=3),
        "labels": jnp.asarray(labels),
        "owners": jnp.tile(jnp.array([1, 2, -1]), (CLIPS, 1)),
    }


def test_the_loss_depends_on_the_expression_of_those_who_are_shown(transformer):
    batch, keys = make_batch(), jax.random.split(jax.random.key(0), CLIPS)
    empty_text = jnp.zeros((1, 1, TINY_WAN.text_dim))

    @nnx.jit
    def objective(model, batch):
        return velocity_objective(model, batch, keys, config=STAGE, empty_text=empty_text)

    def loss(**changes):
        value, metrics = objective(transformer, batch | changes)
        assert metrics == {"loss_everywhere": value}  # there are no lips
        return float(value)

    expression, labels = batch["expression"], batch["labels"]
    # The second person matters where they are shown, and to the background.
    other = {"expression": expression.at[:, 1].multiply(-1)}
    assert abs(loss(**other) - loss()) > 1e-5
    first_alone = {"labels": jnp.ones_like(labels)}
    assert loss(**first_alone, **other) == loss(**first_alone)
    # Padding matters nowhere; with a label it would.
    padding = {"expression": expression.at[:, 2].multiply(-1)}
    assert loss(**padding) == loss()
    assert loss(**padding, owners=abs(batch["owners"])) != loss(owners=abs(batch["owners"]))
    # Owners say whose expression it is, in any order.
    turned = {"expression": expression[:, ::-1], "owners": batch["owners"][:, ::-1]}
    assert loss(**turned) == pytest.approx(loss(), rel=1e-5)


def test_without_masked_attention_all_tokens_attend_to_everybody_who_is_there(transformer):
    batch = make_batch()
    inputs = ClipInputs.from_batch(batch, jnp.zeros((1, 1, TINY_WAN.text_dim)))
    adapter = transformer.adapters["expression"]
    shared = abstract(ExpressionAdapter, replace(adapter.config, masked=False))
    other = tiny_transformer(replace(TINY_WAN, num_layers=1), expression=shared)
    masked, everybody = (
        np.asarray(condition(x, inputs).attended["expression"].mask) for x in (transformer, other)
    )
    shown = np.asarray(batch["labels"]).swapaxes(1, 2)
    assert not masked[shown == 1][:, 1:].any()
    assert (everybody == [True, True, False]).all()


def test_conditions_are_dropped_independently():
    groups = ("expression", "image", "text")
    kept = draw_kept(jax.random.split(jax.random.key(0), 20_000), groups, 0.2)
    values = np.stack([kept[name] for name in groups])
    np.testing.assert_allclose(values.mean(axis=1), 0.8, atol=0.01)
    assert np.abs(np.corrcoef(values) - np.eye(3)).max() < 0.03


@pytest.mark.parametrize(
    ("changes", "stage", "message"),
    [
        ({"expression": None}, STAGE, "have no expression, which the expression adapter takes"),
        ({"owners": None}, STAGE, "have no owners"),
        ({"expression": np.zeros((2, 9, 7))}, STAGE, "expression has width 7, not 23"),
        ({"labels": np.zeros((3, 5), int)}, STAGE, r"labels has size \(3, 5\), not \(3, 6\)"),
        ({"owners": np.zeros(2, int)}, STAGE, r"owners has size \(2,\), not \(3,\)"),
        ({}, replace(STAGE, lip_mask_probability=0.5), "have no lips, but lip_mask_probability is 0.5"),
    ],
)
def test_config_error_for_records_that_do_not_fit(transformer, changes, stage, message):
    batch = {name: x[0] for name, x in make_batch().items()}
    check_inputs(transformer, batch, STAGE)
    record = {name: x for name, x in (batch | changes).items() if x is not None}
    with pytest.raises(ConfigError, match=f"^clips: {message}[^\n]*$"):
        check_inputs(transformer, record, stage, name="clips")


# A run on clips of one person and of two


VIDEO = VideoConfig(height=64, width=64, num_frames=9, fps=25)


def raw_clip(seed, *, people, shown):
    """Noise, in which people, who are padded to `people`, move to the right."""
    rng = np.random.default_rng(seed)
    points = np.zeros((people, VIDEO.num_frames, 5, 2), np.float32)
    boxes = np.zeros((people, VIDEO.num_frames, 4), np.float32)
    for n in range(shown):
        corner = np.array([64 * n + 8, 12]) + np.arange(VIDEO.num_frames)[:, None] * [1, 0]
        points[n] = ALIGNED_POINTS / 7 + corner[:, None]
        boxes[n] = np.concatenate([corner, corner + 30], axis=1)
    return {
        "video": rng.integers(0, 256, (VIDEO.num_frames, 64, 64 * people, 3), np.uint8),
        "people": shown,
        "face_box": boxes,
        "face_points": points,
        "prompt": "",
    }


@pytest.fixture(scope="module")
def networks():
    return small_networks(small_model())


@pytest.fixture(scope="module")
def store(tmp_path_factory, networks):
    """A store of random weights without an expression adapter."""
    folder = tmp_path_factory.mktemp("weights")
    for slot, config in small_model().networks.items():
        if slot != "expression_adapter":
            save_network(folder / slot, networks[slot], component=component_of(config).name)
    return folder


def raw_features(clip):
    return {
        name: tfds.features.Text()
        if name == "prompt"
        else tfds.features.Tensor(shape=np.shape(x), dtype=np.asarray(x).dtype.type, encoding="bytes")
        for name, x in clip.items()
    }


def encoded_clips(folder, networks, store, people):
    """Encoded clips of the debug config, with the metadata that `prepare` writes."""
    video = VIDEO.for_size(64, 64 * people)
    clips = [raw_clip(seed, people=people, shown=people - seed % people) for seed in range(3)]
    hashes = record_hashes(store)
    metadata = {"video": video, "vae": hashes["vae"], "hashes": hashes}
    raw = write_dataset(
        "clips", folder / "raw", lambda: raw_features(clips[0]), {"train": clips, "test": clips[:2]}, {}
    )
    return encode_dataset(networks, raw, folder, metadata)


@pytest.mark.slow
def test_people_of_clips_are_encoded_as_those_of_drivers(networks):
    encoder = networks["motion_encoder"]
    clip = raw_clip(0, people=3, shown=2)
    encoded = encode_people(encoder, clip)
    people = [
        DrivingFace(box.astype(float), points.astype(float), np.ones(VIDEO.num_frames, bool))
        for box, points in zip(clip["face_box"][:2], clip["face_points"][:2], strict=True)
    ]
    driver = Driver("clip", clip["video"], people)
    boxes = np.stack([person.boxes[0] for person in people])
    picture = Image.fromarray(clip["video"][0])
    scene = Scene(picture, boxes, [driver], (1, 2), VIDEO.num_frames, ())
    np.testing.assert_array_equal(encoded["labels"], scene.labels())
    assert set(np.unique(encoded["labels"])) == {0, 1, 2}
    np.testing.assert_allclose(encoded["expression"][:2], encode_motion(encoder, scene.faces())[0], atol=1e-5)
    assert not encoded["expression"][2].any()
    assert encoded["owners"].tolist() == [1, 2, -1]


@pytest.mark.slow
def test_portraits_are_trained_on_clips_of_one_person_and_of_two(tmp_path, networks, store, monkeypatch):
    folders = [encoded_clips(tmp_path / str(people), networks, store, people) for people in (1, 2)]
    spec = batch_spec(small_model(), VIDEO.for_size(64, 128), 2, people=2)
    record = open_split(folders[1], "train")[0]
    shapes = {name: x.shape for name, x in record.items() if name != "text"}
    assert shapes == {name: x.shape[1:] for name, x in spec.items() if name != "text"}

    trained = []
    step = Trainer._step

    def observed(self, state, frozen_state, batch, number):
        trained.append({name: x.shape for name, x in batch.items()})  # once for each compiled program
        return step(self, state, frozen_state, batch, number)

    monkeypatch.setattr(Trainer, "_step", observed)
    settings = {
        "train.shares": (2.0, 1.0),
        "train.mesh.fsdp": 2,
        "train.mesh.context": 2,
        "train.loop.num_workers": 0,
        "train.loop.sample_every": 6,
        "train.stages.0.num_steps": 6,
        "train.stages.0.batch_size": 2,
        "train.stages.0.optimizer.warmup_steps": 1,
        "train.stages.0.optimizer.learning_rate": 0.01,
        "sample.num_inference_steps": 2,
    }
    arguments = [
        "--config=configs/fantasy_portrait_14b.py:debug",
        f"--weights={store}",
        *(f"--records={folder}" for folder in folders),
        f"--workdir={tmp_path / 'run'}",
    ]
    assert train.main([*arguments, *(f"--config.{name}={value}" for name, value in settings.items())]) == 0
    assert [x["labels"] for x in trained] == [(2, 3, 16), (2, 3, 32)]
    assert [x["expression"][1] for x in trained] == [1, 2]
    weights = tmp_path / "run/weights"
    assert (weights / "transformer").is_symlink()
    assert not (weights / "expression_adapter").is_symlink()
    video, sampling = read_pipeline(weights, "FantasyPortraitPipeline", PortraitSampleConfig)
    assert (video, sampling.num_inference_steps) == (VIDEO, 2)
    written = b"".join(path.read_bytes() for path in (tmp_path / "run/stage_1").glob("events*"))
    for name in (b"validation/1/loss_everywhere", b"validation/2/loss_everywhere", b"2/sampled"):
        assert name in written
