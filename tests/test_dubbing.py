"""Dubbing before the pipeline: scenes, speakers, masks, frame rates, and latents that are held."""

import numpy as np
import pytest
from drawn_faces import Squares, clip
from helpers import normal, tiny_inputs, tiny_transformer
from real_people import media_file, need_mediapipe, tracked

from fantasy_jax.diffusion.flow import sampling_sigmas
from fantasy_jax.diffusion.guidance import GuidanceBranch
from fantasy_jax.diffusion.held import HeldLatents, first_step, hold
from fantasy_jax.diffusion.sampler import SamplerConfig, sample
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.preprocessing import dubbing, face_masks
from fantasy_jax.preprocessing.face_masks import Square
from fantasy_jax.preprocessing.landmarks import MEDIAPIPE_FACE, LandmarkConfig

CONFIG = LandmarkConfig()


def scenes_of(*videos):
    """The scenes of these videos, one after another; every second one has a blue background."""
    videos = [video.copy() for video in videos]
    for video in videos[1::2]:
        video[..., 2] = 255
    return dubbing.find_scenes(np.concatenate(videos), 25.0, Squares(), CONFIG)


def test_scenes_are_cut_apart_and_their_faces_go_from_left_to_right():
    scenes = scenes_of(clip((10, 200), (20, 30), frames=6), clip(frames=7), clip((30, 90), frames=8))
    assert [(scene.first, scene.num_frames, len(scene.faces)) for scene in scenes] == [
        (0, 6, 2),
        (6, 7, 0),
        (13, 8, 1),
    ]
    left, right = (face.boxes[0, 0] for face in scenes[0].faces)
    assert 30 < left < right - 150


def test_who_speaks_is_said_by_number_or_by_box():
    (scene,) = scenes_of(clip((10, 200), (20, 30), frames=6))
    left, right = scene.faces
    assert dubbing.choose_face(scene, person=1) is left
    assert dubbing.choose_face(scene, person=2) is right
    assert dubbing.choose_face(scene, person=0) is None
    assert dubbing.choose_face(scene, box=np.array([180.0, 20, 250, 90])) is right
    assert dubbing.choose_face(scene, box=np.array([100.0, 20, 150, 90])) is None
    with pytest.raises(MediaError, match=r"v.mp4: frames 0 to 5 show 2 people; .*--person=1 to 2"):
        dubbing.choose_face(scene, name="v.mp4")
    with pytest.raises(ConfigError, match="--person=3"):
        dubbing.choose_face(scene, person=3)


def test_one_person_needs_no_number():
    (scene,) = scenes_of(clip((10, 200), frames=6))
    assert dubbing.choose_face(scene) is scene.faces[0]


def test_frames_without_the_face_have_no_mask():
    video = clip((20, lambda index: None if index < 8 else 30), frames=16)
    (scene,) = scenes_of(video)
    speaker = dubbing.track_speaker(scene, scene.faces[0], video.shape[1:3], "mouth")
    assert speaker.portrait == 8
    assert [speaker.mask(index).any() for index in range(16)] == [False] * 8 + [True] * 8
    np.testing.assert_allclose(speaker.points[2], (30 + 15 - speaker.square.left, 55 - speaker.square.top))


def test_the_crop_of_a_scene_holds_the_face_in_all_of_its_frames():
    video = clip((20, lambda index: 40 + 3 * index), frames=10)
    (scene,) = scenes_of(video)
    square = dubbing.track_speaker(scene, scene.faces[0], video.shape[1:3], "none").square
    boxes = scene.faces[0].boxes
    assert square.side == round(1.8 * (boxes[-1, 2] - boxes[0, 0]))
    assert square.left + square.side / 2 == pytest.approx(40 + 57 / 2, abs=2)
    assert 0 <= square.top <= 120 - square.side


@pytest.mark.parametrize("box", [(-10, -20, 60, 90), (250, 60, 330, 130), (0, 0, 320, 120)])
def test_a_crop_lies_inside_the_frame(box):
    square = face_masks.square_around(np.array([box], float), 120, 320)
    assert 0 <= square.left <= 320 - square.side
    assert 0 <= square.top <= 120 - square.side
    assert square.side <= 120
    assert square.cut(np.zeros((120, 320, 3), np.uint8)).shape == (square.side, square.side, 3)


def test_the_mouth_of_a_real_face_lies_inside_the_mask_and_the_eyes_outside():
    need_mediapipe()
    media_file("talking.mp4")
    video, _, _, (face,) = tracked("talking.mp4")
    for index in range(0, len(video), 10):
        points = face.points[index, :, :2]
        outline = face_masks.landmark_outline(face.points[index], face.layout, "mouth")
        mask = face_masks.paint_mask(outline, max(video.shape[1:3]))
        lips, (_, chin) = (
            points[list(part)].astype(int) for part in (face.layout.outer_lips, face.layout.midline)
        )
        assert mask[lips[:, 1], lips[:, 0]].all()
        assert mask[chin[1] + int(0.05 * np.ptp(points[:, 1])), chin[0]]
        for eye in (face.layout.right_eye, face.layout.left_eye):
            x, y = points[list(eye)].mean(axis=0).astype(int)
            assert not mask[y, x]
        whole = face_masks.landmark_outline(face.points[index], face.layout, "face")
        whole = face_masks.paint_mask(whole, len(mask))
        assert (mask & ~whole).sum() <= 5  # corners are rounded to pixels
        assert mask.sum() < 0.75 * whole.sum()


def test_the_mask_of_a_box_is_the_lower_half_of_its_ellipse_and_a_margin():
    box = np.array([20.0, 10, 60, 70])
    mask = face_masks.paint_mask(face_masks.box_outline(box, "mouth"), 100)
    rows, columns = np.nonzero(mask)
    margin = 0.08 * 60
    assert rows.min() == pytest.approx(40 - margin, abs=1)
    assert rows.max() == pytest.approx(70 + margin, abs=1)
    assert (columns.min(), columns.max()) == (
        pytest.approx(20 - margin, abs=1),
        pytest.approx(60 + margin, abs=1),
    )
    whole = face_masks.paint_mask(face_masks.box_outline(box, "face"), 100)
    assert np.nonzero(whole)[0].min() == pytest.approx(10 - margin, abs=1)
    assert whole[mask].all()


def test_a_latent_is_free_if_the_mask_touches_any_pixel_of_its_four_frames():
    masks = np.zeros((9, 32, 32), bool)
    masks[0, 31, 0] = masks[1, 8, 15] = masks[4, 7, 16] = masks[5, 0, 31] = True
    free = face_masks.latent_mask(masks, 32)
    assert free.shape == (3, 4, 4)
    assert np.argwhere(free).tolist() == [[0, 3, 0], [1, 0, 2], [1, 1, 1], [2, 0, 3]]


@pytest.mark.parametrize(("side", "size"), [(96, 32), (20, 64), (50, 48)])
def test_masks_of_another_size_keep_every_touched_latent(side, size):
    masks = np.zeros((1, side, side), bool)
    masks[0, side - 1, 0] = masks[0, side // 2, side // 2] = True
    free = face_masks.latent_mask(masks, size)
    assert free.shape == (1, size // 8, size // 8)
    assert free[0, -1, 0]
    assert free[0, size // 16, size // 16]
    assert free.sum() <= 5


@pytest.mark.parametrize(("side", "feather"), [(64, 4), (384, 6), (1024, 8)])
def test_the_feather_lies_inside_of_the_mask(side, feather):
    mask = np.zeros((side, side), bool)
    mask[10:50, 10:50] = True
    alpha = face_masks.opacity(mask)
    assert (alpha[~mask] == 0).all()
    assert (alpha[mask] > 0).all()
    assert np.count_nonzero(alpha[30, 10:30] < 1) == feather - 1
    assert (np.diff(alpha[30, 9:30]) >= 0).all()


def test_pixels_outside_of_the_mask_keep_their_bytes():
    random = np.random.default_rng(0)
    frame = random.integers(0, 255, (80, 100, 3), np.uint8)
    generated = random.integers(0, 255, (32, 32, 3), np.uint8)
    square, mask = Square(30, 10, 64), np.zeros((64, 64), bool)
    mask[20:50, 15:40] = True
    pasted = face_masks.paste(frame, generated, square, face_masks.opacity(mask))
    inside = np.zeros(frame.shape[:2], bool)
    inside[30:60, 45:70] = True
    assert np.array_equal(pasted[~inside], frame[~inside])
    assert not np.array_equal(pasted[inside], frame[inside])
    expected = face_masks.resize_crop(generated, 64)
    assert np.array_equal(pasted[40:50, 55:60], expected[30:40, 25:30])
    nothing = face_masks.opacity(np.zeros_like(mask))
    assert np.array_equal(face_masks.paste(frame, generated, square, nothing), frame)


def test_the_outline_of_landmarks_follows_the_axis_of_a_face():
    points = np.zeros((468, 3), np.float32)
    points[:, :2] = 50
    points[[33, 133, 362, 263], :2] = (30, 40), (42, 40), (58, 40), (70, 40)
    points[[1, 61, 291, 152, 10], :2] = (50, 56), (40, 68), (60, 68), (50, 90), (50, 10)
    upright = face_masks.landmark_outline(points, MEDIAPIPE_FACE, "mouth")
    margin = 0.08 * 80
    assert upright[:, 1].min() == pytest.approx(50 - margin, abs=0.1)
    assert upright[:, 1].max() == pytest.approx(90 + margin, abs=0.1)
    turned = points.copy()
    turned[:, 0], turned[:, 1] = 100 - points[:, 1], points[:, 0]
    lying = face_masks.landmark_outline(turned, MEDIAPIPE_FACE, "mouth")
    assert lying[:, 0].max() == pytest.approx(50 + margin, abs=0.1)
    assert lying[:, 0].min() == pytest.approx(10 - margin, abs=0.1)


@pytest.mark.parametrize("count", [5, 6, 9, 30, 80, 81])
@pytest.mark.parametrize(("source", "model"), [(25.0, 25.0), (23.976, 23.976), (30.0, 23.0), (60.0, 24.0)])
def test_each_frame_shows_the_generated_frame_that_is_nearest_in_time(count, source, model):
    rates = dubbing.match_rates(count, source, model)
    assert len(rates.shown) == count
    assert len(rates.taken) % 4 == 1
    assert len(rates.taken) >= max(rates.shown.max() + 1, 5)
    assert len(rates.taken) < rates.shown.max() + 1 + 5
    late = rates.shown / model - np.arange(count) / source
    assert np.abs(late).max() <= 0.5 / model + 1e-9
    if source == model:
        assert np.array_equal(rates.shown, np.arange(count))
        assert np.array_equal(rates.taken[:count], np.arange(count))


def test_frames_at_indices_are_read_once_and_no_further():
    frames = iter(range(10))
    assert list(dubbing.at_indices(frames, np.array([1, 1, 2, 5]))) == [1, 1, 2, 5]
    assert next(frames) == 6


def test_a_generated_frame_is_free_wherever_it_is_pasted():
    video = clip((20, lambda index: 40 + 3 * index), frames=12)
    (scene,) = scenes_of(video)
    speaker = dubbing.track_speaker(scene, scene.faces[0], video.shape[1:3], "mouth")
    rates = dubbing.match_rates(12, 60.0, 24.0)
    masks = list(dubbing.generated_masks(speaker, rates))
    assert len(masks) == len(rates.taken)
    for index, shown in enumerate(rates.shown):
        assert masks[shown][speaker.mask(index)].all()


def test_a_mask_that_is_empty_is_refused():
    outside = np.array([[-50.0, -50], [-40, -50], [-40, -40]])
    speaker = dubbing.Speaker(7, Square(0, 0, 40), [outside, None], np.zeros((5, 2)), 0)
    with pytest.raises(MediaError, match=r"v.mp4: the mask is empty from frame 7 on"):
        dubbing.check_mask(speaker, "v.mp4")


@pytest.fixture(scope="module")
def sampling():
    """A transformer, noise, inputs, and latents of a source."""
    noise, inputs = tiny_inputs(audio=(11, 12))
    return tiny_transformer(), noise, inputs, normal(*noise.shape, seed=5)


def run(sampling, held=None, **settings):
    transformer, noise, inputs, _ = sampling
    config = SamplerConfig(num_inference_steps=4, shift=5.0)
    return sample(
        transformer, noise, inputs, config, guidance=(GuidanceBranch((), (1.0,) * 4),), held=held, **settings
    )


def test_latents_outside_of_the_mask_are_the_sources(sampling):
    *_, source = sampling
    mask = np.zeros((*source.shape[:-1], 1), np.float32)
    assert np.array_equal(run(sampling, HeldLatents(source, mask)), source)
    mask[:, 1:, :2] = 1
    mixed = np.asarray(run(sampling, HeldLatents(source, mask)))
    where = np.broadcast_to(mask == 0, mixed.shape)
    assert np.array_equal(mixed[where], np.asarray(source)[where])
    assert np.abs(mixed - source)[~where].mean() > 0.01
    free = run(sampling, HeldLatents(source, np.ones_like(mask)))
    np.testing.assert_allclose(free, run(sampling), rtol=1e-6)


def test_after_each_step_the_source_has_that_steps_noise(sampling):
    _, noise, _, source = sampling
    seen = []
    held = HeldLatents(source, np.zeros((*source.shape[:-1], 1), np.float32))
    run(sampling, held, callback=lambda step, *latents: seen.append([np.asarray(x) for x in latents]))
    for sigma, (latents, predicted) in zip(sampling_sigmas(4, 5.0)[1:], seen, strict=True):
        np.testing.assert_allclose(latents, (1 - sigma) * source + sigma * noise, atol=1e-6)
        np.testing.assert_allclose(predicted, source, atol=1e-4)


def test_strength_is_a_noise_level(sampling):
    *_, source = sampling
    held = HeldLatents(source, np.ones((*source.shape[:-1], 1), np.float32))
    assert np.array_equal(run(sampling, held, strength=0.0), source)
    steps = []
    run(sampling, held, strength=0.84, callback=lambda step, *_: steps.append(step))
    assert steps == [2, 3]  # the level before step 2 of 4 is 0.833 with a shift of 5
    sigmas = sampling_sigmas(4, 5.0)
    assert [first_step(sigmas, x) for x in (1.0, 0.95, 0.6, 0.0)] == [0, 1, 3, 4]


def test_holding_keeps_free_latents_as_they_are(sampling):
    _, noise, _, source = sampling
    mask = np.ones((*source.shape[:-1], 1), np.float32)
    assert np.array_equal(hold(2 * source, HeldLatents(source, mask), noise, 0.3), 2 * source)
