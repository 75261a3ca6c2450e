"""Conditions of a clip: dropped groups, adapters without their input, and options of adapters."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import abstract, relative, tiny_inputs, tiny_transformer
from systems import full_model

from fantasy_jax.models.adapters.audio import AudioAdapter
from fantasy_jax.models.adapters.identity import IdentityAdapter
from fantasy_jax.models.adapters.motion import MotionAdapter
from fantasy_jax.system.conditioning import condition, velocity
from fantasy_jax.video import VideoConfig

VIDEO = VideoConfig(height=32, width=48, num_frames=9)


@pytest.fixture(scope="module")
def conditioned():
    """A transformer with all adapters, noise, and inputs of two clips."""
    model = full_model()
    transformer = tiny_transformer(
        model.transformer,
        audio=abstract(AudioAdapter, model.audio_adapter),
        motion=abstract(MotionAdapter, model.motion_adapter),
        identity=abstract(IdentityAdapter, model.identity_adapter),
    )
    adapters = {
        row.network.input: row.network.input_shape(model.networks[row.slot], VIDEO)
        for row in model.adapters.values()
    }
    return transformer, *tiny_inputs(model.transformer, **adapters)


GROUPS = ("text", "image", "audio")
compiled_velocity = nnx.jit(velocity)


def predict(conditioned, keep=None, **changes):
    transformer, latents, inputs = conditioned
    conditions = condition(transformer, replace(inputs, **changes), keep=keep)
    return compiled_velocity(transformer, latents, jnp.float32(0.7), conditions)


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_dropped_for_all_samples_or_for_some(conditioned, group):
    kept, dropped = (predict(conditioned, {group: keep}) for keep in (True, False))
    some = predict(conditioned, {group: jnp.array([1.0, 0.0])})
    assert relative(dropped, kept) > 1e-3
    assert relative(some[0], kept[0]) < 2e-6
    assert relative(some[1], dropped[1]) < 2e-6
    np.testing.assert_array_equal(kept, predict(conditioned))


def test_a_dropped_group_has_no_effect(conditioned):
    inputs = conditioned[2]
    without_image = [
        predict(
            conditioned,
            {"image": False},
            image=factor * inputs.image,
            first_frame=factor * inputs.first_frame,
            adapters=inputs.adapters | {"face": factor * inputs.adapters["face"]},
        )
        for factor in (1, 2)
    ]
    np.testing.assert_array_equal(*without_image)
    audio = inputs.adapters | {"audio": 2 * inputs.adapters["audio"]}
    without_audio = [
        predict(conditioned, {"audio": False}, adapters=adapters) for adapters in (inputs.adapters, audio)
    ]
    np.testing.assert_array_equal(*without_audio)
    without_text = [predict(conditioned, {"text": False}, text=factor * inputs.text) for factor in (1, 2)]
    np.testing.assert_array_equal(*without_text)
    assert np.array_equal(
        without_text[0], predict(conditioned, text=inputs.negative_text, negative_text=inputs.text)
    )


def test_an_adapter_without_its_input_is_not_used(conditioned):
    transformer, _, inputs = conditioned
    conditions = condition(transformer, replace(inputs, adapters={}))
    assert set(conditions.attended) == {"text", "image"}
    assert conditions.time_offset is None
    assert set(condition(transformer, inputs).attended) == {"text", "image", "audio", "identity"}


def test_options_are_arguments_of_the_adapters(conditioned):
    transformer, _, inputs = conditioned
    options = {"audio": {"attention": "clip", "scale": 3.0}, "motion": {"scale": 2.0}}
    found = condition(transformer, inputs, options=options)
    adapters, features = transformer.adapters, inputs.adapters
    np.testing.assert_array_equal(found.attended["audio"].scale, [3.0, 3.0])
    assert found.attended["audio"].tokens.ndim == 3
    np.testing.assert_array_equal(
        found.time_offset, adapters["motion"].time_offset(features["motion"], scale=2.0)
    )
    np.testing.assert_array_equal(found.attended["identity"].scale, [0.5, 0.5])
