"""The transformer beyond parity: scanned blocks, adapters that start from nothing, precision, errors."""

import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import reference_inputs, reference_transformer, relative

from fantasy_jax.models.adapters.audio import AudioAdapter, AudioAdapterConfig
from fantasy_jax.models.condition import Condition
from fantasy_jax.models.wan import SAVED_NAMES, WanConfig, WanTransformer

pytestmark = pytest.mark.networks


@pytest.fixture(scope="module")
def reference():
    return reference_transformer(), reference_inputs()


def run(model, x, **more):
    conditions = model.conditions(x["text"], x["clip_features"]) | more
    return model(x["latents"], x["condition_latents"], x["timestep"], conditions)


def test_an_adapter_that_starts_from_zero_changes_nothing(reference):
    model, x = reference
    trained = model.adapters["audio"]
    fresh = AudioAdapter(trained.config, rngs=nnx.Rngs(0))
    without = run(model, x)
    assert relative(run(model, x, audio=trained.frame_level(x["audio_features"], 17)), without) > 1e-3
    model.adapters["audio"] = fresh
    assert np.array_equal(run(model, x, audio=fresh.frame_level(x["audio_features"], 17)), without)
    model.adapters["audio"] = trained


def test_audio_of_scale_zero_is_no_audio(reference):
    model, x = reference
    silent = model.adapters["audio"].frame_level(x["audio_features"], 17, scale=0.0)
    assert np.array_equal(run(model, x, audio=silent), run(model, x))


def test_padding_of_a_window_is_never_heard(reference):
    model, x = reference
    heard = model.adapters["audio"].frame_level(x["audio_features"], 17)
    padding = jnp.arange(heard.tokens.shape[2]) >= heard.lengths[..., None]
    assert padding.any()
    loud = Condition(jnp.where(padding[..., None], 100.0, heard.tokens), heard.lengths)
    assert relative(run(model, x, audio=loud), run(model, x, audio=heard)) < 1e-7


def test_errors_say_what_does_not_fit(reference):
    model, x = reference
    with pytest.raises(ValueError, match=r"no adapter for \['face'\]; the model has \['audio'\]"):
        run(model, x, face=Condition(x["text"]))
    cut = {name: x[name][:, :, :7] for name in ("latents", "condition_latents")}
    with pytest.raises(ValueError, match="latents of 7 x 12 do not divide into patches 2 x 2"):
        run(model, x | cut)
    with pytest.raises(ValueError, match="text has 17 tokens, the model takes 16"):
        run(model, x | {"text": jnp.zeros((1, 17, 40))})


def test_recomputing_activations_changes_no_gradient(reference):
    model, x = reference

    def gradient(saved_names):
        model.saved_names = saved_names
        graphdef, state = nnx.split(model)
        model.saved_names = None

        def loss(state):
            return jnp.mean(run(nnx.merge(graphdef, state), x) ** 2)

        return jax.jit(jax.grad(loss))(state)

    plain, saved = (jax.tree.leaves(gradient(names)) for names in (None, SAVED_NAMES))
    for a, b in zip(plain, saved, strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-6 * float(jnp.abs(a).max() + 1e-12))


def compiled_forward(config: WanConfig, audio: AudioAdapterConfig):
    """The forward pass compiled from shapes alone."""

    def make():
        adapter = AudioAdapter(audio, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        return WanTransformer(
            config,
            adapters={"audio": adapter},
            rngs=nnx.Rngs(0),
            dtype=jnp.bfloat16,
            param_dtype=jnp.bfloat16,
        )

    graphdef, state = nnx.split(nnx.eval_shape(make))

    def forward(state, latents, first_frame, timestep, text, image, audio):
        model = nnx.merge(graphdef, state)
        conditions = model.conditions(text, image)
        conditions["audio"] = model.adapters["audio"].frame_level(audio, 9)
        return model(latents, first_frame, timestep, conditions)

    shapes = ((1, 3, 8, 8, 16), (1, 3, 8, 8, 20), (1,), (1, 20, 4096), (1, 257, 1280), (1, 19, 768))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(forward).lower(state, *arguments)


def test_forty_blocks_of_the_14b_model_compile_like_two():
    start = time.perf_counter()
    forty = compiled_forward(WanConfig(), AudioAdapterConfig())
    text = forty.as_text()
    forty.compile()
    seconds = time.perf_counter() - start
    two = compiled_forward(replace(WanConfig(), num_layers=2), replace(AudioAdapterConfig(), num_layers=2))
    assert len(text) < 1.05 * len(two.as_text())
    assert seconds < 30, seconds
