"""The loss of the velocity, and masks of lips on the grid of the latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fantasy_jax.diffusion.losses import project_mask, velocity_loss


def test_the_first_latent_frame_covers_the_first_video_frame_only():
    frames = np.zeros((1, 9, 16, 16), np.float32)
    frames[:, 0] = 1
    assert np.array_equal(project_mask(jnp.asarray(frames), 2, 2)[0, :, 0, 0], [1, 0, 0])
    frames = np.zeros((1, 9, 16, 16), np.float32)
    frames[:, 5:] = 1
    projected = project_mask(jnp.asarray(frames), 2, 2)[0, :, 0, 0]
    assert projected[0] == 0
    assert projected[1] < 0.2
    assert projected[2] > 0.8


def test_a_linear_mask_is_projected_as_by_torch():
    import torch

    frames, rows, columns = np.meshgrid(*(np.linspace(0, 1, n) for n in (17, 64, 64)), indexing="ij")
    mask = ((frames + rows + 2 * columns) / 4).astype(np.float32)[None]
    projected = np.asarray(project_mask(jnp.asarray(mask), 8, 8))[:, 1:]
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(mask[:, None, 1:]), size=(4, 8, 8), mode="trilinear"
    ).numpy()[:, 0]
    # Torch interpolates between two pixels, `project_mask` averages a window, which the border truncates.
    inside = (slice(None), slice(1, -1), slice(1, -1), slice(1, -1))
    assert np.abs(projected[inside] - expected[inside]).max() < 1e-5


def test_a_mouth_lower_than_a_latent_keeps_its_area():
    mask = np.zeros((1, 5, 32, 32), np.float32)
    mask[:, :, 9:11, 8:24] = 1  # two rows, neither of which is in the middle of a latent
    projected = project_mask(jnp.asarray(mask), 4, 4)
    assert projected[0, 0].sum() * 64 == pytest.approx(mask[0, 0].sum(), rel=0.2)


def test_the_masked_loss_is_a_mean_over_the_mask():
    keys = jax.random.split(jax.random.key(0), 2)
    target = jax.random.normal(keys[0], (3, 2, 4, 4, 5))
    velocity = target + jnp.where(jnp.arange(4)[:, None, None] < 2, 1.0, 3.0)  # off by 1 above, by 3 below
    lips = jnp.zeros((3, 2, 4, 4)).at[0, :, 0].set(1).at[1, :, :2].set(1)
    masked = jnp.ones(3, bool)
    # Masks of a quarter and of a half, both above; the third is empty, which gives the mean of all.
    np.testing.assert_allclose(velocity_loss(velocity, target, lips, masked), [1, 1, 5], rtol=1e-5)
    np.testing.assert_allclose(velocity_loss(velocity, target, lips, ~masked), [5, 5, 5], rtol=1e-5)
    # Divided by the area of the image instead.
    undivided = velocity_loss(velocity, target, lips, masked, by_area=False)
    np.testing.assert_allclose(undivided, [1 / 4, 1 / 2, 5], rtol=1e-5)
    softer = velocity_loss(velocity, target, lips, masked, outside=1.0)
    np.testing.assert_allclose(softer, [5, 5, 5], rtol=1e-5)
