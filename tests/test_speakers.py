"""Several people, each with a sound: attention to their own only, and who is matched with which sound."""

import functools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from drawn_faces import clip, open_squares
from flax import nnx
from helpers import (
    TINY_AUDIO,
    TINY_WAN,
    abstract,
    layer,
    normal,
    randomise,
    relative,
    tiny_inputs,
    tiny_transformer,
)
from PIL import Image
from real_people import CONFIG as LANDMARKS
from real_people import media_file, need_mediapipe

from fantasy_jax import media
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.miniature.rotary import RotaryAudioAdapter, RotaryAudioAdapterConfig
from fantasy_jax.models.adapters.audio import AudioAdapter
from fantasy_jax.models.layers import run
from fantasy_jax.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from fantasy_jax.pipelines import speakers
from fantasy_jax.preprocessing.audio import normalise_waveform
from fantasy_jax.preprocessing.images import fit_image
from fantasy_jax.preprocessing.landmarks import LandmarkConfig
from fantasy_jax.system.conditioning import condition, velocity
from fantasy_jax.system.encoders import encode_audio

pytestmark = pytest.mark.usefixtures("highest_precision")

FRAMES, TOKENS, SPACE, PEOPLE = 3, 19, 6, 2
ADAPTERS = {
    "official": (AudioAdapter, TINY_AUDIO),
    "rotary": (RotaryAudioAdapter, RotaryAudioAdapterConfig(**vars(TINY_AUDIO))),
}
SOUNDS = normal(2, PEOPLE, TOKENS, TINY_AUDIO.feature_width, seed=0)
LABELS = np.random.default_rng(1).integers(0, 4, (2, FRAMES, SPACE)).astype(np.int32)


@pytest.fixture(scope="module", params=["official", "rotary"])
def transformer(request):
    network, config = ADAPTERS[request.param]
    return tiny_transformer(audio=abstract(network, config))


def inputs_of(sounds, labels=None, owners=None):
    """Noise and inputs of two clips with these speech features."""
    noise, inputs = tiny_inputs(size=(FRAMES, 4, 6))
    inputs = replace(inputs, adapters={"audio": sounds})
    if labels is not None:
        inputs = replace(inputs, labels=jnp.asarray(labels))
    return noise, inputs if owners is None else replace(inputs, owners={"audio": jnp.asarray(owners)})


@functools.partial(nnx.jit, static_argnames="attention")
def _attended(transformer, inputs, attention):
    given = condition(transformer, inputs, options={"audio": {"attention": attention}}).attended["audio"]
    width = TINY_WAN.dim // TINY_WAN.num_heads
    queries = normal(2, SPACE, FRAMES, TINY_WAN.num_heads, width, seed=2)
    return layer(transformer.adapters["audio"].layers, 0)(queries, given)


def attended(transformer, inputs, attention="frame"):
    """The audio attention of the first block, `[B, S, F, D]`."""
    return np.asarray(_attended(transformer, inputs, attention)).reshape(2, SPACE, FRAMES, -1)


@nnx.jit
def predict(transformer, noise, inputs):
    return velocity(transformer, noise, jnp.array(0.5), condition(transformer, inputs))


@pytest.mark.parametrize("attention", ["frame", "clip"])
def test_each_person_attends_to_their_own_sound(transformer, attention):
    owners = [[2, 1]] * 2
    both = attended(transformer, inputs_of(SOUNDS, LABELS, owners)[1], attention)
    each = [attended(transformer, inputs_of(SOUNDS[:, i])[1], attention) for i in range(PEOPLE)]
    shown = LABELS.swapaxes(1, 2)
    for index, owner in enumerate(owners[0]):
        assert relative(both[shown == owner], each[index][shown == owner]) < 1e-6
    assert np.any(shown == 3)
    assert not both[shown == 3].any()  # a person without a sound
    background = both[shown == 0]
    assert all(relative(background, alone[shown == 0]) > 1e-2 for alone in each)


@pytest.mark.parametrize("attention", ["frame", "clip"])
def test_one_sound_for_all_labels_is_that_of_the_whole_picture(transformer, attention):
    whole = attended(transformer, inputs_of(SOUNDS[:, 0])[1], attention)
    for labels in (np.ones_like(LABELS), LABELS % 2):
        one = attended(transformer, inputs_of(SOUNDS[:, :1], labels)[1], attention)
        assert relative(one, whole) < 1e-6


def test_the_velocity_of_one_sound_for_all_labels_is_that_of_the_whole_picture(transformer):
    labelled, whole = inputs_of(SOUNDS[:, :1], np.ones_like(LABELS), [[1]] * 2), inputs_of(SOUNDS[:, 0])
    expected = predict(transformer, *whole)
    assert relative(predict(transformer, *labelled), expected) < 1e-5
    other = inputs_of(SOUNDS[:, :1], np.ones_like(LABELS), [[2]] * 2)
    assert relative(predict(transformer, *other), expected) > 1e-3


def test_a_person_without_a_sound_gets_exactly_nothing_from_it(transformer):
    shown = LABELS.swapaxes(1, 2)
    one = attended(transformer, inputs_of(SOUNDS[:, :1], LABELS, [[2]] * 2)[1])
    assert np.array_equal(np.any(one != 0, axis=-1), (shown == 0) | (shown == 2))
    nobody = attended(transformer, inputs_of(SOUNDS, LABELS, [[-1, -1]] * 2)[1])
    assert not nobody.any()


def test_one_sound_without_labels_has_no_axis_of_people(transformer):
    given = condition(transformer, inputs_of(SOUNDS[:, 0])[1]).attended["audio"]
    assert given.tokens.ndim == 4
    assert given.mask is None


@pytest.fixture(scope="module")
def encoder():
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return randomise(abstract(Wav2Vec2Model, config))


def test_silence_after_a_sound_does_not_change_its_level(encoder):
    speech = np.random.default_rng(0).normal(0.01, 0.1, 4000).astype(np.float32)
    assert np.array_equal(encode_audio(encoder, speech, num_samples=4000), encode_audio(encoder, speech))
    padded = np.pad(normalise_waveform(speech), (0, 4000))
    found = encode_audio(encoder, speech, num_samples=8000)
    assert np.array_equal(found, run(encoder, jnp.asarray(padded)[None]))
    # Normalised with the silence, the same speech is louder.
    assert relative(found, encode_audio(encoder, np.pad(speech, (0, 4000)))) > 1e-3


SIZE = (320, 128)
LEFT, RIGHT = np.array([0.05, 0.1, 0.3, 0.6]), np.array([0.6, 0.1, 0.9, 0.6])


@pytest.fixture
def _squares(monkeypatch):
    monkeypatch.setattr(speakers, "MediaPipeFaces", open_squares)


def picture(*lefts):
    """A picture of faces of 30 pixels with these left edges."""
    people = [(20 * number, left) for number, left in enumerate(lefts, 1)]
    return Image.fromarray(clip(*people, frames=1, height=128)[0])


def find(image, count=1, **options):
    return speakers.find_speakers(image, fit_image(image, 320), count, landmarks=LandmarkConfig(), **options)


def tokens(found):
    """The person of each token of the row through the faces."""
    return found.labels(2).reshape(2, 8, 20)[0, 3].tolist()


def test_one_sound_needs_no_face():
    found = find(picture())  # without a detector
    assert (found.labels(3), found.targets, found.notes) == (None, (1,), ())


@pytest.mark.usefixtures("_squares")
def test_sounds_belong_to_people_from_left_to_right():
    found = find(picture(40, 220), 2)
    assert (found.targets, found.notes) == ((1, 2), ())
    assert found.labels(3).shape == (3, 8 * 20)
    # Boxes of 40 to 70 and 220 to 250 grow by a quarter.
    assert [i for i, label in enumerate(tokens(found)) if label == 1] == [2, 3, 4]
    assert [i for i, label in enumerate(tokens(found)) if label == 2] == [13, 14, 15, 16]
    swapped = find(picture(40, 220), 2, people=[2, 1])
    assert swapped.targets == (2, 1)
    assert tokens(swapped) == tokens(found)


@pytest.mark.usefixtures("_squares")
def test_people_without_a_sound_have_a_label_of_their_own():
    found = find(picture(40, 140, 220), 1, people=[2])
    assert found.targets == (2,)
    assert set(tokens(found)) == {0, 1, 2, 3}
    assert [note[:8] for note in found.notes] == ["person 1", "person 3"]
    alone = find(picture(100), 1, people=[1])
    assert (alone.labels(1), alone.targets) == (None, (1,))


@pytest.mark.usefixtures("_squares")
def test_regions_of_people_do_not_meet():
    found = find(picture(), 2, boxes=[LEFT, np.array([0.3, 0.1, 0.5, 0.6])])
    assert tokens(found) == [0] + [1] * 5 + [2] * 4 + [0] * 10
    below = find(picture(), 2, boxes=[LEFT * [1, 1, 1, 0.5], LEFT + np.array([0, 0.25, 0, 0.25])])
    assert set(np.unique(below.labels(1))) == {0, 1, 2}


def test_a_real_picture_of_two_people():
    need_mediapipe()
    image = media.read_image(media_file("two_people.png"))
    found = speakers.find_speakers(image, fit_image(image, 320), 2, landmarks=LANDMARKS)
    assert (found.targets, found.notes) == ((1, 2), ())
    labels = found.labels(1).reshape(found.size[0] // 16, -1)
    columns = [np.nonzero((labels == number).any(axis=0))[0] for number in (1, 2)]
    assert columns[0].max() < columns[1].min()


def test_boxes_take_the_place_of_detection():
    found = find(picture(100), 2, boxes=[RIGHT, LEFT])
    assert tokens(found)[13] == 1
    assert tokens(found)[3] == 2
    assert find(picture(), 1, boxes=[LEFT, RIGHT], people=[2]).targets == (2,)
    tiny = np.array([0.61, 0.41, 0.62, 0.45])
    (note,) = find(picture(), 2, boxes=[tiny, tiny + np.array([0.011, 0, 0.011, 0])]).notes
    assert note.startswith("person 1")


@pytest.mark.usefixtures("_squares")
@pytest.mark.parametrize(
    ("lefts", "count", "options", "error", "named"),
    [
        ((40,), 2, {}, MediaError, "--audio"),
        ((), 2, {}, MediaError, "--box"),
        ((), 1, {"people": [1]}, MediaError, "--box"),
        ((40, 220), 3, {}, MediaError, "2 people"),
        ((40, 220), 1, {"people": [3]}, ConfigError, "--person=3"),
        ((40, 220), 1, {"people": [0]}, ConfigError, "--person=0"),
        ((40, 220), 2, {"people": [1, 1]}, ConfigError, "--person"),
        ((40, 220), 2, {"people": [1]}, ConfigError, "--person"),
        ((40, 220), 1, {"boxes": [LEFT]}, ConfigError, "--box"),
        ((40, 220), 2, {"boxes": [LEFT, LEFT]}, ConfigError, "overlap"),
        ((40, 220), 2, {"boxes": [LEFT, RIGHT + 0.2]}, ConfigError, "--box"),
        ((40, 220), 3, {"boxes": [LEFT, RIGHT]}, MediaError, "--audio"),
    ],
)
def test_what_cannot_be_is_refused(lefts, count, options, error, named):
    with pytest.raises(error, match=named) as raised:
        find(picture(*lefts), count, **options)
    assert "\n" not in str(raised.value)
