"""The whole path of FantasyPortrait against PyTorch's: the same picture, faces and noise give equal latents.

The pipeline runs the debug configuration of the 14B system with random weights, none of them zero, on a scene
of given faces. `torch_portrait` computes the same with PyTorch; its weights are ours, converted by the tables
that export them.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_network, relative
from PIL import Image
from test_end_to_end import save_tokenizer

from fantasy_jax import FantasyPortraitPipeline
from fantasy_jax.config import build, load_config
from fantasy_jax.pipelines.config import PortraitSampleConfig
from fantasy_jax.pipelines.scene import Driver, Scene
from fantasy_jax.preprocessing.driving import ALIGNED_POINTS, DrivingFace
from fantasy_jax.preprocessing.text import load_tokenizer
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Networks
from fantasy_jax.video import VideoConfig

pytestmark = [
    pytest.mark.slow,
    # diffusers and its dependencies announce their own changes.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

DEBUG = load_config(str(Path(__file__).parent.parent / "configs/fantasy_portrait_14b.py:debug"))
CONFIG = build(PortraitSampleConfig, DEBUG.sample, "sample")
PROMPT = "Three  people are talking &amp;amp; smiling, “softly”."
WIDTH, HEIGHT, FRAMES = 96, 64, 9
BOXES = np.array([[4.7, 12, 27, 37], [35, 21, 52, 44], [52.5, 8, 86, 42]])
"""Faces of the picture. The grown boxes of the second and of the third touch the same tokens."""


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Our networks, with random weights."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, [PROMPT, CONFIG.negative_prompt])

    def load(component, config, dtype, mesh):
        return random_network(config, scale=0.1)

    model = build(ModelConfig, DEBUG.model, "model")
    networks = Networks(model, load, lambda: load_tokenizer(folder))
    networks.folder = folder
    return networks


@pytest.fixture(scope="module")
def noise():
    """As `torch.randn` makes it, `[1, C, F, h, w]`."""
    return np.random.default_rng(1).standard_normal((1, 16, 3, HEIGHT // 8, WIDTH // 8), np.float32)


def driver(number):
    """A driving video of one face, which moves, aligned as it is."""
    random = np.random.default_rng(number)
    rows, columns, time = np.meshgrid(*(np.arange(n) for n in (224, 224, FRAMES)), indexing="ij")
    waves = [np.sin(rows / random.uniform(9, 40) + columns / random.uniform(9, 40) + time) for _ in range(3)]
    frames = np.moveaxis(128 + 120 * np.stack(waves, axis=-1), 2, 0).astype(np.uint8)
    boxes = np.array([60, 40, 160, 180]) + np.cumsum(random.normal(0, 7, (FRAMES, 4)), axis=0)
    points = np.tile(ALIGNED_POINTS, (FRAMES, 1, 1))
    return Driver("driver", frames, [DrivingFace(boxes, points, np.ones(FRAMES, bool))])


@pytest.fixture(scope="module")
def picture():
    """Uint8 pixels, `[H, W, 3]`."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    colours = np.stack([rows * 3, columns * 2, 128 + 90 * np.sin(rows / 7) * np.cos(columns / 9)], axis=-1)
    return colours.astype(np.uint8)


@pytest.fixture(scope="module")
def scene(picture):
    """Three people, each with a driver."""
    return Scene(Image.fromarray(picture), BOXES, [driver(i) for i in range(3)], (1, 2, 3), FRAMES, ())


def only(scene, people):
    """The scene with the first people of the picture; nobody is told apart where there is one."""
    boxes = scene.boxes[: people if people > 1 else 0]
    return replace(scene, boxes=boxes, drivers=scene.drivers[:people], targets=scene.targets[:people])


@pytest.fixture(scope="module")
def torch_parts(networks, picture, noise):
    """PyTorch's networks, and the inputs that do not depend on drivers."""
    import torch
    import torch_portrait
    import torch_system

    parts = torch_portrait.torch_networks(networks)
    pixels = torch.tensor(picture.astype(np.float32) * (2 / 255) - 1).permute(2, 0, 1)
    prompt, negative = (
        torch_system.encode_text(parts["text_encoder"], networks.folder, text)
        for text in (PROMPT, CONFIG.negative_prompt)
    )
    return parts, {
        "prompt": prompt,
        "negative": negative,
        "image": torch_system.encode_image(parts["image_encoder"], pixels),
        "first_frame": torch_system.encode_first_frame(parts["vae"], pixels, FRAMES),
        "noise": torch.from_numpy(noise),
    }


def attended(torch_parts, scene, order="official_attention"):
    """What PyTorch's transformer attends to, in one of `torch_portrait`'s ways; and the labels."""
    import torch_portrait

    parts, _ = torch_parts
    faces = np.stack(list(scene.faces()), axis=1)
    features = torch_portrait.encode_motion(parts["motion_encoder"], faces)
    windows = parts["transformer"].windows(features, FRAMES)
    if len(scene.boxes) == 0:
        return (windows[0], None), None
    moving = [person.boxes for person in scene.people]
    labels = torch_portrait.token_labels(scene.boxes, moving, HEIGHT, WIDTH, FRAMES)
    return getattr(torch_portrait, order)(windows, labels), labels


def expected(torch_parts, attended, cfg_scale, **changes):
    """PyTorch's final latents."""
    import torch_portrait

    parts, inputs = torch_parts
    return torch_portrait.sample(
        parts["transformer"],
        inputs | changes,
        attended,
        cfg_scale=cfg_scale,
        portrait_scale=CONFIG.expression_guidance_scale,
        num_steps=CONFIG.num_inference_steps,
        shift=CONFIG.shift,
    )


def latents(networks, scene, noise, cfg_scale):
    """Our final latents."""
    pipeline = FantasyPortraitPipeline(networks, build(VideoConfig, DEBUG.video, "video"), CONFIG)
    noise = jnp.asarray(np.moveaxis(noise, 1, -1))
    with jax.default_matmul_precision("highest"):
        output = pipeline(scene, prompt=PROMPT, noise=noise, guidance_scale=cfg_scale)
    return np.moveaxis(np.asarray(output.latents), -1, 1)


@pytest.mark.parametrize("cfg_scale", [1.0, 5.0], ids=["two passes", "three passes"])
@pytest.mark.parametrize(
    ("people", "order"),
    [(1, None), (2, "official_attention"), (3, "right_attention")],
    ids=["one", "two", "three"],
)
def test_latents_are_those_of_pytorch(networks, torch_parts, scene, noise, people, order, cfg_scale, capsys):
    scene = only(scene, people)
    given, labels = attended(torch_parts, scene, order)
    if labels is not None:
        np.testing.assert_array_equal(scene.labels(), labels)
        assert set(np.unique(labels)) == set(range(people + 1))
    difference = relative(latents(networks, scene, noise, cfg_scale), expected(torch_parts, given, cfg_scale))
    with capsys.disabled():
        print(f" [{difference:.1e}]", end="")
    assert difference < 1e-5


def test_labels_of_random_boxes(scene):
    from torch_portrait import token_labels

    random = np.random.default_rng(2)
    corners = random.uniform((0, 0), (WIDTH, HEIGHT), (100, 3, 2, 2))
    for boxes in np.concatenate([corners.min(axis=2), corners.max(axis=2)], axis=-1):
        moving = [person.boxes for person in scene.people]
        labels = token_labels(boxes, moving, HEIGHT, WIDTH, FRAMES)
        np.testing.assert_array_equal(replace(scene, boxes=boxes).labels(), labels)


def test_the_official_order_is_right_for_two_people_and_wrong_for_three(torch_parts, scene):
    """Face 1 sees drivers 1 and 2, face 2 drivers 1 and 3, face 3 drivers 2 and 3."""
    differences = []
    for people in (2, 3):
        orders = "official_attention", "right_attention"
        given = [attended(torch_parts, only(scene, people), order)[0] for order in orders]
        differences.append(relative(*(expected(torch_parts, x, 1.0) for x in given)))
    assert differences[0] < 1e-6
    assert differences[1] > 1e-3

    (_, mask), labels = attended(torch_parts, scene, "official_attention")
    seen = mask.unflatten(-1, (3, -1)).flip(-2)  # by person from left to right
    for label, drivers in {0: (1, 2, 3), 1: (1, 2), 2: (1, 3), 3: (2, 3)}.items():
        for number in (1, 2, 3):
            assert (seen[labels == label][:, number - 1] == (number in drivers)).all()


@pytest.mark.parametrize("name", ["prompt", "negative", "image", "first_frame", "noise"])
def test_latents_depend_on_every_input(torch_parts, scene, name):
    """The effect of each input is far above the limit, so that an error in it would be found."""
    _, inputs = torch_parts
    given, _ = attended(torch_parts, only(scene, 2))
    usual, changed = (
        expected(torch_parts, given, 5.0, **{name: x}) for x in (inputs[name], inputs[name].flip(-1))
    )
    assert relative(changed, usual) > 1e-3


@pytest.mark.parametrize("change", ["drivers", "mask", "padding", "neutral"])
def test_latents_depend_on_what_is_attended_to(torch_parts, scene, change):
    import torch

    (tokens, mask), _ = attended(torch_parts, only(scene, 2))
    half = tokens.shape[1] // 2
    padding = torch.tile((tokens == 0).all(dim=-1)[:, None], (1, mask.shape[1], 1))
    assert padding[0].sum(dim=-1).unique() == 2 * 73
    assert not padding[1:].any()
    changed = {
        "drivers": (torch.cat([tokens[:, half:], tokens[:, :half]], dim=1), mask),
        "mask": (tokens, torch.ones_like(mask)),
        "padding": (tokens, mask & ~padding),
        "neutral": (tokens[:1].expand_as(tokens), mask),
    }[change]
    usual = expected(torch_parts, (tokens, mask), 1.0)
    assert relative(expected(torch_parts, changed, 1.0), usual) > 3e-4
