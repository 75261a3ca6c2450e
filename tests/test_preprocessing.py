"""Preprocessing of images, audio and text, compared with the original implementations."""

import html

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative
from PIL import Image

from fantasy_jax.media import resample
from fantasy_jax.preprocessing import images, text
from fantasy_jax.preprocessing.audio import normalise_waveform
from fantasy_jax.video import audio_samples, wav2vec2_length


def noise(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def random_image(width, height):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((640, 480), (512, 384)),
        ((333, 1000), (176, 512)),
        ((512, 512), (512, 512)),
        ((97, 61), (512, 336)),
        ((1000, 3), (512, 16)),
    ],
)
def test_fit_image_is_two_pillow_resizes(size, fitted):
    original = random_image(*size)
    scale = 512 / max(size)
    once = original.resize(tuple(int(side * scale) for side in size), Image.LANCZOS)
    twice = once.resize(tuple((side + 15) // 16 * 16 for side in once.size), Image.BICUBIC)
    ours = images.fit_image(original, 512)
    assert ours.size == fitted
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(twice))


def test_fit_image_keeps_at_least_one_row():
    assert images.fit_image(random_image(1200, 1), 512).size == (512, 16)


def test_to_pixels_is_the_official_arithmetic():
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    pixels = images.to_pixels(levels)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, np.array(levels, dtype=np.float32) * (2 / 255) - 1)
    assert (pixels.min(), pixels.max()) == (-1, 1)


@pytest.mark.parametrize("sides", [(80, 64), (512, 288), (480, 832), (100, 37), (224, 224), (9, 1280)])
def test_clip_preprocessing_is_pytorchs_bicubic(sides):
    import torch

    pixels = noise(1, *sides, 3)
    channels_first = torch.tensor(pixels).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        channels_first, size=(224, 224), mode="bicubic", align_corners=False
    )
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    expected = ((resized * 0.5 + 0.5 - mean) / std).permute(0, 2, 3, 1)
    ours = images.clip_image_preprocess(jnp.asarray(pixels))
    assert ours.dtype == jnp.float32
    assert relative(ours, expected.numpy()) < 5e-7


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_normalise_waveform_is_the_feature_extractors(dtype):
    from transformers import Wav2Vec2FeatureExtractor

    waveform = (0.1 * noise(16_000) + 0.02).astype(dtype)
    expected = Wav2Vec2FeatureExtractor()(waveform, sampling_rate=16_000, return_tensors="np")
    ours = normalise_waveform(waveform)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, expected.input_values[0])


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("samples", [10_000, 10_001, 12_346])
def test_resample_is_soxr_with_librosas_length(rate, samples):
    import soxr

    waveform = noise(samples)
    ours = resample(waveform, rate)
    assert ours.dtype == np.float32
    assert ours.size == -(-samples * 16_000 // rate)
    expected = soxr.resample(waveform, rate, 16_000, quality="HQ")
    np.testing.assert_array_equal(ours[: expected.size], expected[: ours.size])
    assert not ours[expected.size :].any()


def test_resample_keeps_a_tone():
    def tone(rate):
        return np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)

    inner = slice(500, -500)  # at the ends the filter reaches beyond the signal
    resampled = resample(tone(44_100), 44_100)
    assert relative(resampled[inner], tone(16_000)[inner]) < 1e-5
    same = tone(16_000)
    assert resample(same, 16_000) is same


def test_resample_is_near_another_resampler():
    from scipy.signal import resample_poly

    # Speech-like: little above 4 kHz, where filters of different steepness agree.
    waveform = np.convolve(noise(44_100), np.hanning(32) / 16, mode="same").astype(np.float32)
    inner = slice(500, -500)
    ours = resample(waveform, 44_100)[inner]
    assert relative(ours, resample_poly(waveform, 160, 441)[inner]) < 5e-3


def test_wav2vec2_length_equals_transformers():
    from transformers import Wav2Vec2Config

    config = Wav2Vec2Config()

    def chain(samples):
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    for samples in range(400, 3_000):
        assert wav2vec2_length(samples) == chain(samples)
    assert wav2vec2_length(399) == wav2vec2_length(0) == 0
    assert wav2vec2_length(audio_samples(81, 23)) == 175  # FantasyTalking's clip


PROMPTS = [
    "  A woman\tspeaks.\n\n She  smiles. ",
    "schÃ¶n &amp;amp; gut &lt;b&gt; &amp;quot;ja&amp;quot;",
    "“curly” quotes…　全角　空白 ﬁn",
    "control\x1c\x1f\x85&#28;&#x85;&nbsp;characters",
    "",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_clean_is_the_official_cleaning(prompt):
    import ftfy
    import regex

    cleaned = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    assert text.clean(prompt) == regex.sub(r"\s+", " ", cleaned).strip()


def test_clean_gives_known_results():
    assert text.clean(PROMPTS[0]) == "A woman speaks. She smiles."
    assert text.clean(PROMPTS[1]) == 'schön & gut <b> "ja"'


def test_tokenize_pads_on_the_right_and_returns_lengths():
    tokenizer = text.byte_tokenizer()
    ids, lengths = text.tokenize(["a  b", "", "x" * 50], tokenizer, max_length=20)
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int32)
    end = tokenizer.eos_token_id
    np.testing.assert_array_equal(lengths, [4, 1, 20])
    np.testing.assert_array_equal(ids[0], [*(b + 3 for b in b"a b"), end, *[tokenizer.pad_token_id] * 16])
    assert ids[2, -1] == end
    assert len(tokenizer) == 384


def test_tokenize_equals_the_official_call():
    tokenizer = text.byte_tokenizer()
    official = tokenizer(
        [text.clean(p) for p in PROMPTS],
        return_tensors="np",
        padding="max_length",
        truncation=True,
        max_length=512,
        add_special_tokens=True,
    )
    ids, lengths = text.tokenize(PROMPTS, tokenizer)
    np.testing.assert_array_equal(lengths, official["attention_mask"].sum(axis=1))
    np.testing.assert_array_equal(ids, official["input_ids"][:, : ids.shape[1]])


def test_load_tokenizer_reads_a_folder(tmp_path):
    text.byte_tokenizer().save_pretrained(tmp_path)
    loaded = text.load_tokenizer(tmp_path)
    np.testing.assert_array_equal(text.tokenize(["ä b"], loaded)[0], [[198, 167, 35, 101, 1]])
