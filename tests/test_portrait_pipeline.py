"""The Python API: `FantasyPortraitPipeline`, and a model with audio and expression."""

import itertools
from dataclasses import replace

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_faces import Squares, clip, open_squares
from flax import nnx
from helpers import normal, relative, small_networks
from PIL import Image

from configs import fantasy_talking_14b
from configs.fantasy_portrait_14b import small_model
from fantasy_jax import FantasyPortraitPipeline, FantasyTalkingPipeline, media
from fantasy_jax.config import as_json
from fantasy_jax.diffusion.guidance import GuidanceBranch
from fantasy_jax.diffusion.sampler import SamplerConfig, sample
from fantasy_jax.errors import ConfigError, MediaError, WeightsError
from fantasy_jax.miniature.face_detector import FaceDetectorConfig
from fantasy_jax.models.condition import Condition, KVProjection
from fantasy_jax.pipelines import base, scene
from fantasy_jax.pipelines.config import PortraitSampleConfig, SampleConfig, write_pipeline
from fantasy_jax.preprocessing import driving
from fantasy_jax.preprocessing.driving import DrivingConfig
from fantasy_jax.preprocessing.text import byte_tokenizer
from fantasy_jax.system import encoders
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.networks import random_networks
from fantasy_jax.system.registry import component_of
from fantasy_jax.system.streaming import DecodingPlan
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.store import save_network

VIDEO = VideoConfig(height=64, width=64, num_frames=5, fps=25)
STEPS = PortraitSampleConfig(num_inference_steps=2, driving=DrivingConfig(smooth=False))


def picture(*lefts):
    """Faces of 30 pixels in 320 x 120 pixels, of which 64 x 32 are generated."""
    return clip(*[(20 * number, left) for number, left in enumerate(lefts, 1)], frames=1)[0]


def driver(left=50, level=100, frames=5):
    return clip((level, left), frames=frames)


def run(pipeline, **options):
    """Two people, each with a driver."""
    return pipeline(picture(40, 220), [driver(), driver(200, 200)], **options)


@pytest.fixture(scope="module", autouse=True)
def _squares():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene, "open_detector", open_squares)
        yield


@pytest.fixture(scope="module")
def pipeline():
    return FantasyPortraitPipeline(small_networks(small_model()), VIDEO, STEPS, keep="all")


@pytest.fixture(scope="module")
def dry_pipeline():
    """A pipeline without weights, for use with `sampled`."""
    networks = random_networks(small_model(), byte_tokenizer())
    empty = {slot: nnx.Module() for slot in networks}
    empty["motion_encoder"].config = networks.config.motion_encoder  # the size of its faces
    return FantasyPortraitPipeline(networks.replace(**empty), VIDEO, STEPS)


class NoDecoder:
    """Black frames in place of decoded ones."""

    first = True

    def plan(self, latents):
        return DecodingPlan((), 1)

    def chunks(self, latents):
        return [slice(i, i + 1) for i in range(latents.shape[1])]

    def __call__(self, latents):
        for _ in range(latents.shape[1]):
            yield np.zeros((1 if self.first else 4, 32, 64, 3), np.uint8)
            self.first = False


@pytest.fixture
def sampled(monkeypatch):
    """Collects inputs and options of the sampler; it and all networks are replaced by what costs nothing."""
    calls = []

    def sample(transformer, noise, inputs, config, **options):
        calls.append((inputs, options))
        return noise

    def encode_first_frame(networks, pixels, num_frames):
        size = pixels.shape[1:3]
        return jnp.zeros(replace(VIDEO, num_frames=num_frames).for_size(*size).latent_shape(1, 16))

    def encode_motion(_, faces):
        faces = list(faces)
        return jnp.zeros((1, len(faces[0]), len(faces), 66))

    monkeypatch.setattr(base, "sample", sample)
    monkeypatch.setattr(base, "StreamingDecoder", lambda *_, **__: NoDecoder())
    monkeypatch.setattr(encoders, "encode_text", lambda _, prompts: [jnp.zeros((1, 3, 32))] * len(prompts))
    monkeypatch.setattr(encoders, "encode_image", lambda *_: jnp.zeros((1, 257, 32)))
    monkeypatch.setattr(encoders, "encode_first_frame", encode_first_frame)
    monkeypatch.setattr(encoders, "encode_motion", encode_motion)
    return calls


@pytest.mark.slow
def test_two_people_become_a_clip(pipeline):
    steps = []
    out = run(pipeline, seed=1, callback_on_step_end=steps.append)
    assert out.frames.shape == (5, 32, 64, 3)
    assert out.frames.dtype == np.uint8
    assert out.latents.shape == (1, 2, 4, 8, 16)
    assert (out.fps, out.audio, out.seconds) == (25, None, 0.2)
    assert [(x.stage, x.step, x.num_steps) for x in steps] == [("Transformer", i, 2) for i in (1, 2)]
    assert np.array_equal(steps[1].latents, out.latents)
    assert np.array_equal(steps[1].preview.frames, out.frames)  # decoded by the VAE
    assert np.array_equal(run(pipeline, seed=1).latents, out.latents)
    made = pipeline.scene(picture(40, 220), [driver(), driver(200, 200)])
    assert np.array_equal(pipeline(made, seed=1).latents, out.latents)
    for change in ({"seed": 2}, {"seed": 1, "people": [2, 1]}, {"seed": 1, "expression_guidance_scale": 2.0}):
        assert not np.array_equal(run(pipeline, **change).latents, out.latents)


def test_a_clip_is_as_long_as_its_shortest_driver(dry_pipeline, sampled):
    longer = FantasyPortraitPipeline(dry_pipeline.networks, replace(VIDEO, num_frames=9), STEPS)
    out = longer(picture(40, 220), [driver(frames=7), driver(200, 200, frames=20)])
    assert out.latents.shape[1] == 2
    ((inputs, _),) = sampled
    assert inputs.adapters["expression"].shape[:3] == (1, 2, 5)
    assert inputs.first_frame.shape == (1, 2, 4, 8, 20)
    assert inputs.labels.shape == (1, 2, 8)


def test_each_person_attends_to_their_own_driver_only(dry_pipeline, sampled):
    run(dry_pipeline)
    run(dry_pipeline, people=[2, 1])
    dry_pipeline(picture(40, 220), [driver()], people=[2])
    dry_pipeline(picture(40), [driver()])
    both, swapped, second, alone = (inputs for inputs, _ in sampled)
    assert [x.owners["expression"].tolist() for x in (both, swapped, second)] == [[[1, 2]], [[2, 1]], [[2]]]
    assert (alone.labels, alone.owners) == (None, {})
    labels = np.asarray(both.labels[0]).T  # space, frame
    assert set(np.unique(labels)) == {0, 1, 2}

    projection = KVProjection(16, 48, 4, use_bias=False, norm_epsilon=None, rngs=nnx.Rngs(0))
    q = normal(1, *labels.shape, 4, 12, seed=0)

    @jax.jit
    def attend(tokens, mask):
        return projection(q, Condition(tokens, mask=mask))[0]

    def attended(inputs, change=0.0):
        count = inputs.adapters["expression"].shape[1]
        tokens = normal(1, count, 2, 7, 16, seed=1).at[:, -1].add(change)
        return np.asarray(attend(tokens, inputs.attended_people("expression")))

    def changed_by_the_last_driver(inputs):
        return np.any(attended(inputs, 1.0) != attended(inputs), axis=(-1, -2))

    assert np.array_equal(changed_by_the_last_driver(both), labels != 1)
    assert np.array_equal(changed_by_the_last_driver(swapped), labels != 2)
    # Exactly zero for the person without a driver.
    assert np.array_equal(np.any(attended(second) != 0, axis=(-1, -2)), labels != 1)


@pytest.mark.parametrize(
    ("scales", "branches"), [((1.0, 1.0), 1), ((1.0, 4.0), 2), ((5.0, 4.0), 3)], ids=["1", "2", "3"]
)
def test_guidance_scales_give_branches_and_prompts(dry_pipeline, sampled, monkeypatch, scales, branches):
    prompts = []

    def encode_text(networks, given):
        prompts.extend(given)
        return [jnp.full((1, 3, 32), len(text)) for text in given]

    monkeypatch.setattr(encoders, "encode_text", encode_text)
    given = dict(zip(["guidance_scale", "expression_guidance_scale"], scales, strict=True))
    dry_pipeline(picture(40), driver(), "A cat.", negative_prompt="No dogs.", **given)
    ((inputs, options),) = sampled
    assert len(options["guidance"]) == branches
    assert options["guidance"][-1].dropped == ()
    assert prompts == ["A cat.", "No dogs."][: 1 + (branches == 3)]
    assert (inputs.text == 6).all()
    assert (inputs.negative_text == (8 if branches == 3 else 6)).all()


def test_the_defaults_are_those_of_the_official_scripts():
    config = PortraitSampleConfig()
    assert [branch.dropped for branch in config.guidance] == [("expression",), ()]
    assert [branch.weights[0] for branch in config.guidance] == [-3, 4]
    assert (config.num_inference_steps, config.shift) == (30, 5)


def sounding(path, seconds, frames=5):
    """Writes a driver with a tone."""
    samples = (8000 * np.sin(np.arange(int(16_000 * seconds)) / 10)).astype(np.int16)
    media.write_audio(path.with_suffix(".wav"), samples, 16_000)
    media.write_video(path, driver(frames=frames), 25, audio=path.with_suffix(".wav"), lossless=True)
    return path


def test_the_sound_of_the_first_driver_that_has_any_goes_along(dry_pipeline, sampled, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_pipeline, "config", replace(dry_pipeline.config, max_seconds=0.2))
    loud = sounding(tmp_path / "loud.mp4", 1.0, frames=25)
    media.write_video(tmp_path / "silent.mp4", driver(), 25, lossless=True)
    Image.fromarray(driver()[0]).save(tmp_path / "face.png")
    for first in (tmp_path / "silent.mp4", tmp_path / "face.png", driver()):
        out = dry_pipeline(picture(40, 220), [first, loud])
        assert out.audio == str(loud)
    out.save(tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        streams = container.streams.video[0], container.streams.audio[0]
        assert [float(x.duration * x.time_base) for x in streams] == pytest.approx([0.2, 0.2], abs=0.03)


def test_a_piece_of_the_drivers(dry_pipeline, sampled, tmp_path, monkeypatch):
    """Frames and sound of a driver begin at the same time; a picture stays as it is."""
    changed = replace(dry_pipeline.config, start=0.4, max_seconds=0.2)
    monkeypatch.setattr(dry_pipeline, "config", changed)
    loud = sounding(tmp_path / "loud.mp4", 1.0, frames=25)
    scene = dry_pipeline.scene(picture(40), loud, size=(32, 32))
    assert (scene.num_frames, scene.picture.size) == (5, (32, 32))
    frames, whole = list(scene.drivers[0].frames), media.read_video(loud)[0]
    assert np.array_equal(frames[0], whole[10])
    out = dry_pipeline(scene)
    assert out.audio == media.AudioPart(str(loud), 0.4)
    Image.fromarray(driver()[0]).save(tmp_path / "face.png")
    assert dry_pipeline.scene(picture(40), tmp_path / "face.png").drivers[0].length == 1
    monkeypatch.setattr(dry_pipeline, "config", replace(changed, start=5.0))
    with pytest.raises(MediaError, match=r"loud\.mp4"):
        dry_pipeline.scene(picture(40), loud)


def test_drivers_without_sound_give_a_silent_clip(dry_pipeline, sampled, tmp_path, monkeypatch):
    media.write_video(tmp_path / "silent.mp4", driver(), 25, lossless=True)
    silent = dry_pipeline(picture(40), tmp_path / "silent.mp4")
    silent.save(tmp_path / "out.mp4")
    assert not media.probe_video(tmp_path / "out.mp4").has_audio
    loud = sounding(tmp_path / "loud.mp4", 0.2)
    given = dry_pipeline(picture(40), tmp_path / "silent.mp4", sound=loud)
    assert given.audio == loud
    monkeypatch.chdir(tmp_path)
    loud.rename("driver")  # what messages call frames
    assert dry_pipeline(picture(40), driver()).audio is None


def test_sound_that_cannot_be_read_is_found_before_sampling(dry_pipeline, sampled, tmp_path, monkeypatch):
    (tmp_path / "text.wav").write_text("no sound")
    for name in ("text.wav", "none.wav"):
        with pytest.raises(MediaError, match=name):
            dry_pipeline(picture(40), driver(), sound=tmp_path / name)
    assert not sampled
    loud = sounding(tmp_path / "loud.mp4", 0.2)

    def damaged(path, _):
        raise MediaError(f"{path}: damaged")

    monkeypatch.setattr(media, "check_audio", damaged)
    assert dry_pipeline(picture(40), loud).audio is None


def test_inputs_that_cannot_be_are_refused(dry_pipeline, sampled):
    with pytest.raises(ConfigError, match="drivers"):
        dry_pipeline(picture(40))
    with pytest.raises(ConfigError, match="driver"):
        dry_pipeline(picture(40), [])
    with pytest.raises(MediaError, match="none"):
        dry_pipeline("none.png", driver())
    with pytest.raises(MediaError, match="none"):
        dry_pipeline(picture(40), "none.mp4")
    with pytest.raises(ConfigError, match="num_inference_steps"):
        dry_pipeline(picture(40), driver(), num_inference_steps=0)
    talking = random_networks(fantasy_talking_14b.small_model(), byte_tokenizer())
    with pytest.raises(ConfigError, match="expression_adapter"):
        FantasyPortraitPipeline(talking, VIDEO, STEPS)
    assert not sampled


@pytest.mark.slow
def test_a_store_gives_the_same_pipeline(pipeline, tmp_path):
    networks = dict(pipeline.networks)
    networks["expression_adapter"] = networks["transformer"].adapters["expression"]
    for slot, network in networks.items():
        save_network(tmp_path / slot, network, component=component_of(network.config).name)
    write_pipeline(tmp_path, "FantasyPortraitPipeline", VIDEO, STEPS)
    stored = FantasyPortraitPipeline.from_pretrained(tmp_path, dtype="float32")
    assert (stored.video, stored.config) == (VIDEO, STEPS)
    assert stored.networks.config == small_model()
    expected, found = (x(picture(40), driver(), seed=3).latents for x in (pipeline, stored))
    assert np.array_equal(expected, found)
    with pytest.raises(WeightsError, match="FantasyPortraitPipeline"):
        FantasyTalkingPipeline.from_pretrained(tmp_path)


class OwnSquares(Squares, nnx.Module):
    """A detector that is one of the model's networks."""


def test_the_models_own_detector_finds_the_faces(monkeypatch):
    monkeypatch.setattr(scene, "open_detector", driving.open_detector)
    model = small_model().replace(face_detector=FaceDetectorConfig())
    networks = random_networks(model, byte_tokenizer()).replace(face_detector=OwnSquares())
    found = FantasyPortraitPipeline(networks, VIDEO, STEPS).scene(picture(40, 220), [driver(), driver(200)])
    assert (len(found.boxes), found.targets) == (2, (1, 2))


def test_a_store_of_another_pipeline_is_refused(tmp_path, monkeypatch):
    write_pipeline(tmp_path, "FantasyTalkingPipeline", VIDEO, SampleConfig())
    with pytest.raises(WeightsError, match="FantasyTalkingPipeline"):
        FantasyPortraitPipeline.from_pretrained(tmp_path)
    monkeypatch.setattr(FantasyPortraitPipeline, "bundled", None)
    with pytest.raises(ConfigError, match="bundled"):
        FantasyPortraitPipeline.from_pretrained()


def test_the_sizes_of_a_model_are_read_from_json(tmp_path):
    for sizes in small_model().networks.values():
        component = component_of(sizes)
        assert component.read_config(as_json(sizes), tmp_path) == sizes


@pytest.mark.slow
def test_audio_and_expression_share_a_model():
    talking = fantasy_talking_14b.small_model()
    adapters = {"audio_adapter": talking.audio_adapter, "speech_encoder": talking.speech_encoder}
    model = small_model().replace(**adapters)
    assert set(model.adapters) == {"audio", "expression"}
    transformer = small_networks(model)["transformer"]
    video = VideoConfig(height=32, width=32, num_frames=5, fps=25)
    keys = itertools.count()

    def draw(spec):
        return normal(*spec.shape, seed=next(keys))

    inputs = jax.tree.map(draw, replace(ClipInputs.spec(model, video, 1, people=2), labels=None))
    inputs = replace(inputs, labels=jnp.array([[[0, 1, 2, 2], [0, 1, 2, 2]]], jnp.int32))
    noise = normal(*video.latent_shape(1, 16), seed=next(keys))
    groups = [("audio", "expression"), ("audio",), ("expression",), ()]

    def sampled(weights, **changes):
        guidance = [GuidanceBranch(*x) for x in zip(groups, [(w,) for w in weights], strict=True)]
        given = replace(inputs, adapters=inputs.adapters | changes)
        return sample(transformer, noise, given, SamplerConfig(num_inference_steps=1), guidance=guidance)

    def each_branch(**changes):
        return [sampled(weights, **changes) for weights in np.eye(4).tolist()]

    branches = each_branch()
    assert all(relative(one, other) > 1e-4 for one, other in itertools.combinations(branches, 2))
    for name, matters in {"audio": [False, False, True, True], "expression": [False, True] * 2}.items():
        changed = each_branch(**{name: inputs.adapters[name][..., ::-1]})
        assert [relative(*pair) > 1e-4 for pair in zip(changed, branches, strict=True)] == matters
    weights = [-2.0, -1.0, 0.5, 3.5]
    guided = sum(weight * branch for weight, branch in zip(weights, branches, strict=True))
    assert relative(sampled(weights), guided) < 1e-4
