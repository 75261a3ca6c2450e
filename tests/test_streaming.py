"""Streams through the VAE give the bits of whole videos, in memory that does not grow with the length."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, random_network, relative

from fantasy_jax.miniature.vae import MiniatureVAEConfig
from fantasy_jax.models.vae import VAEConfig
from fantasy_jax.preprocessing.images import from_uint8, to_uint8
from fantasy_jax.sharding import make_mesh, replicate, shard_module
from fantasy_jax.system import streaming
from fantasy_jax.system.registry import component_of
from fantasy_jax.system.streaming import StreamingDecoder, decode_step, encode_stream, plan_decoding
from fantasy_jax.system.vae_memory import temporary_bytes

pytestmark = pytest.mark.usefixtures("highest_precision")

SIZES = {"dim": 4, "dim_mult": (1, 2, 2), "num_res_blocks": 1, "temporal_downsample": (True, True)}
WAN, MINIATURE = VAEConfig(**SIZES), MiniatureVAEConfig(**SIZES, patch=2, overlap=1)
TILES = {"tile": (4, 6), "stride": (2, 4)}
decode = jax.jit(lambda vae, latents: vae.decode(latents))
encode = jax.jit(lambda vae, video, at_once=1: vae.encode(from_uint8(video), at_once), static_argnums=2)


@pytest.fixture(
    scope="module", params=[WAN, pytest.param(MINIATURE, marks=pytest.mark.slow)], ids=["wan", "miniature"]
)
def vae(request):
    return random_network(request.param)


def draw(frames, rows=4, columns=6):
    return 0.3 * normal(1, frames, rows, columns, 16, seed=1)


def draw_video(vae, frames, rows=4, columns=6):
    factor = vae.config.spatial_factor
    shape = (1, frames, rows * factor, columns * factor, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def whole(pixels):
    frames = to_uint8(np.asarray(pixels[0], np.float32))
    assert np.mean((frames > 0) & (frames < 255)) > 0.3  # not clipped to black and white
    return frames


def streamed(decoder, latents, lengths):
    """Decodes in calls of these numbers of latent frames."""
    starts = np.cumsum([0, *lengths])
    parts = [list(decoder(latents[:, a:b])) for a, b in pairwise(starts)]
    return np.concatenate([frames for part in parts for frames in part])


@pytest.mark.parametrize("lengths", [(1,), (2, 2, 1)])
def test_a_stream_of_latents_is_decoded_to_the_bits_of_the_whole(vae, lengths):
    latents = draw(sum(lengths))
    frames = streamed(StreamingDecoder(vae), latents, lengths)
    assert frames.dtype == np.uint8
    assert frames.shape[0] == 4 * sum(lengths) - 3
    assert np.array_equal(frames, whole(decode(vae, latents)))


@pytest.mark.slow
@pytest.mark.parametrize(("lengths", "chunks"), [((5,), [1, 4]), ((3, 3, 4), [1, 2, 3, 4])])
def test_frames_do_not_depend_on_the_latent_frames_that_are_decoded_at_once(
    vae, monkeypatch, lengths, chunks
):
    monkeypatch.setattr(streaming, "free_bytes", lambda: 2**40)
    latents, decoder, found = draw(sum(lengths)), StreamingDecoder(vae), []
    for part in np.split(latents, np.cumsum(lengths)[:-1], axis=1):
        found += [(chunk, decoder.decode(part[:, chunk])) for chunk in decoder.chunks(part)]
    assert [chunk.stop - chunk.start for chunk, _ in found] == chunks
    assert relative(np.concatenate([pixels for _, pixels in found], axis=1), decode(vae, latents)) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [2, 4])
def test_latents_do_not_depend_on_the_frames_that_are_encoded_at_once(vae, at_once):
    video = draw_video(vae, 17)
    assert relative(encode(vae, video, at_once), encode(vae, video)) < 5e-6
    with pytest.raises(ValueError, match="no chunks of"):
        encode(vae, video[:, :13], at_once)


def test_an_image_is_decoded_whole_where_its_memory_is_free():
    vae = component_of(VAEConfig()).abstract(VAEConfig(), jnp.bfloat16)
    latents = jax.ShapeDtypeStruct((1, 1, 64, 64, 16), jnp.float32)

    def plan(free, **settings):
        """Tiles and latent frames at once for 512 x 512 in bfloat16, by free GiB."""
        found = plan_decoding(vae, latents, free * 2**30, **settings)
        return len(found.tiles), found.most

    # Caches of 1.15 GiB and temporaries of 2.25, 3.375, 4.5 and 5.625, in seven tenths of what is free.
    assert [plan(free) for free in (4.8, 4.9, 6.5, 8.1, 9.7)] == [(8, 1), (1, 1), (1, 2), (1, 3), (1, 4)]
    assert (plan(80, tiling="on"), plan(1, tiling="off")) == ((8, 1), (1, 1))
    assert plan(np.inf) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "at_once"), [(8, 1), (16, 1), (16, 4)])
def test_the_account_of_temporaries_is_that_of_the_compiler(side, at_once):
    config = VAEConfig(dim=16)
    vae = component_of(config).abstract(config)
    first, latents = (jax.ShapeDtypeStruct((1, n, side, side, 16), jnp.float32) for n in (1, at_once))
    carried, _ = decode_step.eval_shape(vae, None, first)
    memory = decode_step.lower(vae, carried, latents).compile().memory_analysis()
    accounted = temporary_bytes(config, jnp.float32, (side, side), at_once)
    assert 0.5 * accounted < memory.temp_size_in_bytes < accounted


def test_streams_of_any_length_run_two_programs(vae):
    decode_step.clear_cache()
    list(StreamingDecoder(vae)(draw(2)))
    list(StreamingDecoder(vae)(draw(6)))
    assert decode_step._cache_size() == 2  # of the first latent frame, and of each after it


@pytest.mark.parametrize("lengths", [(1,), (1, 2)])
def test_tiles_of_a_stream_give_the_bits_of_tiles_of_the_whole(vae, lengths):
    latents = draw(sum(lengths), rows=8, columns=10)  # three by two tiles
    expected = blend_by_numpy(lambda x: decode(vae, x), latents, vae.config.spatial_factor)
    frames = streamed(StreamingDecoder(vae, tiling="on", **TILES), latents, lengths)
    assert np.array_equal(frames, whole(expected))


def blend_by_numpy(run, latents, scale):
    """The mean, with weights, of whole clips in tiles."""
    sums = [np.zeros((1, 4 * latents.shape[1] - 3, 8 * scale, 10 * scale, x), np.float32) for x in (3, 1)]
    for row, column in ((row, column) for row in (0, 2, 4) for column in (0, 4)):
        result = np.asarray(run(latents[:, :, row : row + 4, column : column + 6]))
        rows = ramp(4 * scale, 2 * scale, row > 0, row < 4)
        columns = ramp(6 * scale, 2 * scale, column > 0, column < 4)
        weight = np.minimum(rows[:, None], columns[None])[..., None]
        for total, part in zip(sums, (result * weight, weight), strict=True):
            place = total[:, :, row * scale : (row + 4) * scale, column * scale : (column + 6) * scale]
            place += part
    return sums[0] / sums[1]


def ramp(length, border, rises, falls):
    slope = np.minimum(np.arange(1, length + 1, dtype=np.float32) / np.float32(border), 1)
    return np.minimum(slope if rises else 1, slope[::-1] if falls else 1)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 9])
def test_a_stream_on_a_mesh_gives_the_bits_of_the_whole(vae, rows):
    latents, mesh = draw(3, rows=rows), make_mesh(context=2, tensor=4)
    sharded = shard_module(vae, mesh)
    video = draw_video(vae, 9, rows)
    with jax.set_mesh(mesh):
        expected = whole(decode(sharded, replicate(latents)))
        assert np.array_equal(streamed(StreamingDecoder(sharded), replicate(latents), (1, 2)), expected)
        encoded = np.asarray(encode(sharded, replicate(video)))
        assert np.array_equal(np.concatenate(list(encode_stream(sharded, video[0])), axis=1), encoded)


@pytest.mark.parametrize("frames", [1, 13])
def test_a_stream_of_frames_is_encoded_to_the_bits_of_the_whole(vae, frames):
    video = draw_video(vae, frames)
    latents = list(encode_stream(vae, (frame for frame in video[0])))
    assert [x.shape for x in latents] == [(1, 1, 4, 6, 16)] * ((frames + 3) // 4)
    assert np.array_equal(np.concatenate(latents, axis=1), encode(vae, video))


def test_a_stream_of_another_length_is_an_error(vae):
    stream = encode_stream(vae, draw_video(vae, 7)[0])
    assert [next(stream).shape, next(stream).shape] == [(1, 1, 4, 6, 16)] * 2
    with pytest.raises(ValueError, match="7 frames"):
        next(stream)
    with pytest.raises(ValueError, match="0 frames"):
        next(encode_stream(vae, iter(())))
    with pytest.raises(ValueError, match="multiples of"):
        next(encode_stream(vae, draw_video(vae, 1)[0, :, 1:]))


def test_pixels_become_the_same_bytes_on_the_device():
    edges = np.arange(256, dtype=np.float32) / np.float32(127.5) - 1
    near = [np.nextafter(edges, np.float32(x)) for x in (-2, 2)]
    values = np.concatenate([edges, *near, np.linspace(-1.5, 1.5, 44444, dtype=np.float32)])
    pixels = values[: len(values) // 3 * 3].reshape(1, -1, 3)
    assert np.array_equal(jax.jit(to_uint8)(jnp.asarray(pixels)), to_uint8(pixels))
