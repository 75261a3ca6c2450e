"""Reading and writing of images, audio and video, and files that are unreadable."""

import wave
from fractions import Fraction

import av
import numpy as np
import pytest
import soxr
from PIL import Image

from fantasy_jax import media
from fantasy_jax.errors import MediaError
from fantasy_jax.files import check_writable

COLOUR = (200, 120, 40)


def image(size=(12, 8)):
    return Image.new("RGB", size, COLOUR)


def test_common_images_are_read_unchanged(tmp_path):
    for name in ("p.png", "p.bmp", "p.tiff", "p.webp", "p.jpg"):
        options = {"lossless": True} if name.endswith("webp") else {}
        image().save(tmp_path / name, **options)
        read = media.read_image(tmp_path / name)
        assert (read.mode, read.size) == ("RGB", (12, 8))
        assert np.abs(np.asarray(read).astype(int) - COLOUR).max() <= 2


def test_unusual_images_are_converted(tmp_path):
    grey16 = np.full((8, 12), 32768, np.uint16)
    Image.fromarray(grey16).save(tmp_path / "grey16.png")
    assert np.asarray(media.read_image(tmp_path / "grey16.png"))[0, 0].tolist() == [128] * 3
    Image.new("L", (12, 8), 77).save(tmp_path / "grey.png")
    assert np.asarray(media.read_image(tmp_path / "grey.png"))[0, 0].tolist() == [77] * 3
    image().quantize(4).save(tmp_path / "palette.png")
    assert np.asarray(media.read_image(tmp_path / "palette.png"))[0, 0].tolist() == list(COLOUR)
    half = Image.new("RGBA", (12, 8), (*COLOUR, 0))
    half.save(tmp_path / "transparent.png")
    assert np.asarray(media.read_image(tmp_path / "transparent.png"))[0, 0].tolist() == [255] * 3
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image().save(tmp_path / "turned.jpg", exif=exif)
    assert media.read_image(tmp_path / "turned.jpg").size == (8, 12)


def test_an_unreadable_image_is_a_one_line_error(tmp_path):
    image((400, 300)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    noisy.save(tmp_path / "noisy.jpg")
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "noisy.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name in ("missing.png", "cut.png", "cut.jpg", "text.png", "empty.png"):
        with pytest.raises(MediaError) as caught:
            media.read_image(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def tone(rate, seconds=1.0, channels=1):
    time = np.arange(int(rate * seconds)) / rate
    left = 0.4 * np.sin(2 * np.pi * 330 * time)
    return np.stack([left, 0.5 * left][:channels])


def write_audio(path, samples, rate, codec, **options):
    """Encodes a waveform with a codec, as other programs would."""
    layout = "mono" if len(samples) == 1 else "stereo"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, **options)
        stream.layout = layout
        resampler = av.AudioResampler(format=stream.format, layout=layout, rate=rate, frame_size=1024)
        frame = av.AudioFrame.from_ndarray(samples.astype(np.float32), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_of_any_rate_is_the_mean_of_its_channels_resampled(tmp_path, rate, channels):
    samples = (tone(rate, channels=channels) * 32767).round().astype("<i2")
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.T.tobytes())
    mono = (samples / 32768).mean(axis=0).astype(np.float32)
    expected = mono if rate == 16000 else soxr.resample(mono, rate, 16000, quality="HQ")
    read = media.read_audio(tmp_path / "tone.wav")
    assert abs(read.size - 16000) <= 1
    assert np.abs(read[: expected.size] - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("t.flac", "flac", 44100),
        ("t.mp3", "libmp3lame", 44100),
        ("t.ogg", "libopus", 48000),
        ("t.m4a", "aac", 48000),
    ],
)
def test_other_formats_are_the_same_tone(tmp_path, name, codec, rate):
    write_audio(tmp_path / name, tone(rate, channels=2), rate, codec)
    read = media.read_audio(tmp_path / name)
    assert abs(read.size / 16000 - 1) < 0.08  # encoders add zeros at the ends
    spectrum = np.abs(np.fft.rfft(read[2000:14000] * np.hanning(12000)))
    assert abs(spectrum.argmax() * 16000 / 12000 - 330) < 3
    assert 0.2 < np.abs(read[4000:12000]).max() < 0.4


def test_unreadable_audio_is_a_one_line_error(tmp_path):
    def wav(name, frames=b"", width=2):
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(width)
            file.setframerate(16000)
            file.writeframes(frames)

    wav("header.wav")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("not audio, but long enough to be examined")
    media.write_video(tmp_path / "mute.mp4", np.zeros((5, 16, 16, 3), np.uint8), 25)
    samples = np.full((1, 1600), np.nan, np.float32)
    write_audio(tmp_path / "nan.wav", samples, 16000, "pcm_f32le")
    for name in ("missing.wav", "header.wav", "empty.wav", "text.wav", "mute.mp4", "nan.wav"):
        with pytest.raises(MediaError) as caught:
            media.read_audio(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("audio_seconds", [0.4, 0.68, 3.0])
@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_a_written_video_has_audio_of_its_length(tmp_path, audio_seconds, size):
    write_audio(tmp_path / "tone.wav", tone(44100, audio_seconds), 44100, "pcm_s16le")
    rows, columns = np.mgrid[: size[0], : size[1]]
    frames = np.stack([np.stack([rows * 4, columns * 4, rows * 0 + 9 * t], -1) for t in range(17)]).astype(
        np.uint8
    )
    media.write_video(tmp_path / "v.mp4", frames, 25, audio=tmp_path / "tone.wav")
    with av.open(str(tmp_path / "v.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert video.codec_context.pix_fmt == "yuv420p"
        assert abs(video.duration * video.time_base - audio.duration * audio.time_base) < 1 / 25
    read, fps = media.read_video(tmp_path / "v.mp4")
    assert fps == 25
    assert read.shape == (17, size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    difference = read[:, : size[0], : size[1]].astype(float) - frames
    assert np.sqrt((difference**2).mean()) < 8
    read_back = media.read_audio(tmp_path / "v.mp4")
    assert np.abs(read_back[2000:5000]).max() > 0.2


def test_frames_are_written_one_by_one_too(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (5, 15, 17, 3), dtype=np.uint8)
    media.write_video(tmp_path / "all.mp4", frames, 25, lossless=True)
    media.write_video(tmp_path / "each.mp4", (frame for frame in frames), 25, lossless=True)
    assert (tmp_path / "all.mp4").read_bytes() == (tmp_path / "each.mp4").read_bytes()
    with pytest.raises(MediaError, match="frames"):
        media.write_video(tmp_path / "none.mp4", [], 25)
    assert not (tmp_path / "none.mp4").exists()


def test_an_output_is_complete_or_absent(tmp_path):
    target = tmp_path / "v.mp4"
    target.write_text("what was there before")
    with pytest.raises(MediaError):
        media.write_video(target, np.zeros((5, 16, 16, 3), np.uint8), 25, audio=tmp_path / "missing.wav")

    def half():
        yield from np.zeros((3, 16, 16, 3), np.uint8)
        raise RuntimeError("the power fails")

    write_audio(tmp_path / "tone.wav", tone(44100), 44100, "pcm_s16le")
    with pytest.raises(RuntimeError, match="power"):
        media.write_video(target, half(), 25, audio=tmp_path / "tone.wav")
    assert target.read_text() == "what was there before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tone.wav", "v.mp4"]


def test_audio_that_is_resampled_while_it_is_read_has_the_same_bits(tmp_path):
    rng = np.random.default_rng(0)
    for rate in (11_025, 16_000, 44_100):
        samples = rng.integers(-9000, 9000, 3 * rate + 7, np.int16)
        media.write_audio(tmp_path / "noise.wav", samples, rate)
        whole = media.resample((samples / 32768).astype(np.float32), rate)
        assert np.array_equal(media.read_audio(tmp_path / "noise.wav"), whole)
        assert media.audio_seconds(tmp_path / "noise.wav") == samples.size / rate
        start = media.read_audio(tmp_path / "noise.wav", seconds=0.5)
        assert 8000 <= start.size < 12_000
        assert np.array_equal(start[:7900], whole[:7900])


def test_audio_is_muxed_beside_its_frames(tmp_path):
    """A long video: packets of sound and picture alternate, and the sound is what one call would encode."""
    sound = np.random.default_rng(0).uniform(-0.3, 0.3, (2, 44_100 * 30)).astype(np.float32)
    write_audio(tmp_path / "noise.wav", sound, 44_100, "pcm_f32le")
    frames = (np.full((16, 16, 3), t % 256, np.uint8) for t in range(25 * 20))
    media.write_video(tmp_path / "v.mp4", frames, 25, audio=tmp_path / "noise.wav")
    with av.open(str(tmp_path / "v.mp4")) as container:
        packets = [
            (x.stream.type, float(x.dts * x.time_base)) for x in container.demux() if x.dts is not None
        ]
    latest = {"video": 0.0, "audio": 0.0}
    for kind, time in packets:
        latest[kind] = time
        assert abs(latest["video"] - latest["audio"]) < 1
    assert latest["audio"] == pytest.approx(20, abs=0.1)
    write_audio(tmp_path / "whole.mp4", sound[:, : 44_100 * 20], 44_100, "aac", bit_rate=192_000)
    expected, found = (media.read_audio(tmp_path / name, 44_100) for name in ("whole.mp4", "v.mp4"))
    assert np.array_equal(found, expected)


def test_an_unwritable_output_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MediaError, match="file"):
        check_writable(tmp_path / "file" / "v.mp4")
    with pytest.raises(MediaError, match="folder"):
        check_writable(tmp_path)
    check_writable(tmp_path / "new" / "folder" / "v.mp4")
    assert (tmp_path / "new" / "folder").is_dir()


def test_frames_that_cannot_be_encoded_are_an_error(tmp_path):
    with pytest.raises(MediaError, match=r"wide\.mp4"):
        media.write_video(tmp_path / "wide.mp4", np.zeros((1, 16, 20_000, 3), np.uint8), 25)
    assert not list(tmp_path.iterdir())


def test_a_contact_sheet_shows_frames_in_order(tmp_path):
    frames = np.stack([np.full((40, 60, 3), 8 * t, np.uint8) for t in range(30)])
    collected = media.ContactSheet(30, 25)
    assert np.array_equal(list(collected.collect(iter(frames))), frames)
    collected.write(tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    tile_height, tile_width = sheet.shape[0] // 2, sheet.shape[1] // 6
    shades = [int(sheet[20 + tile_height * (i // 6), 60 + tile_width * (i % 6)]) for i in range(12)]
    assert shades == sorted(shades)
    assert shades[0] == 0
    assert shades[-1] == 8 * 29


def write_timed(path, times, *, size=(32, 48), audio_from=None):
    """Writes frames of increasing brightness at these times, in hundredths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=100, options={"crf": "0", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 100)
        audio_stream = (
            container.add_stream("pcm_s16le", rate=16000, layout="mono") if audio_from is not None else None
        )
        for number, time in enumerate(times):
            pixels = np.full((*size, 3), 8 * (number % 32), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio_stream is not None:
            samples = np.full((1, 16000), 1000, np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.pts, frame.time_base = round(audio_from * 16000), Fraction(1, 16000)
            frame.sample_rate = 16000
            container.mux(audio_stream.encode(frame))
            container.mux(audio_stream.encode(None))


def shades(frames):
    return [round(float(frame.mean()) / 8) for frame in frames]


def test_a_video_is_resampled_to_another_rate_by_frame_times(tmp_path):
    write_timed(tmp_path / "even.mkv", range(0, 80, 4))  # 25 a second
    times, frames = zip(*media.stream_video(tmp_path / "even.mkv", 25, (32, 48)), strict=True)
    assert shades(frames) == list(range(20))
    assert np.allclose(times, np.arange(20) / 25)
    _, slower = zip(*media.stream_video(tmp_path / "even.mkv", 12.5, (32, 48)), strict=True)
    assert shades(slower) == list(range(0, 20, 2))
    # A rate that varies: at first 50 a second, then 10; each frame is shown when its time has come.
    write_timed(tmp_path / "varying.mkv", [*range(0, 20, 2), *range(20, 70, 10)])
    times, frames = zip(*media.stream_video(tmp_path / "varying.mkv", 25, (32, 48)), strict=True)
    assert shades(frames)[:6] == [0, 2, 4, 6, 8, 10]
    assert max(abs(time - k / 25) for k, time in enumerate(times)) <= 0.05 + 1e-6
    assert shades(frames)[-1] == 14
    assert 15 <= len(frames) <= 17


@pytest.mark.parametrize("name", ["v.mkv", "v.mp4"])
def test_a_time_far_ahead_repeats_no_frame_for_hours(tmp_path, name):
    write_timed(tmp_path / name, [0, 4, 8, 500_000, 500_004, 500_008])  # 5000 s
    times, frames = zip(*media.stream_video(tmp_path / name, 25), strict=True)
    assert shades(frames) == list(range(6))
    assert np.allclose(times, np.arange(6) / 25)


def test_a_streamed_video_is_scaled(tmp_path):
    write_timed(tmp_path / "v.mkv", range(0, 20, 4))
    info = media.probe_video(tmp_path / "v.mkv")
    assert (info.height, info.width, info.has_audio) == (32, 48, False)
    ((_, frame), *_) = media.stream_video(tmp_path / "v.mkv", 25, (16, 24))
    assert frame.shape == (16, 24, 3)
    ((_, frame), *_) = media.stream_video(tmp_path / "v.mkv", 25)
    assert frame.shape == (32, 48, 3)
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(MediaError, match="text"):
        media.probe_video(tmp_path / "text.mp4")
    with pytest.raises(MediaError, match="missing"):
        list(media.stream_video(tmp_path / "missing.mp4", 25, (16, 24)))


def test_an_image_streams_as_one_frame_and_an_animation_as_a_video(tmp_path):
    images = [Image.fromarray(np.full((32, 48, 3), 90 * i, np.uint8)) for i in range(3)]
    images[1].save(tmp_path / "still.gif")
    images[0].save(tmp_path / "moving.gif", save_all=True, append_images=images[1:], duration=40, loop=0)
    (frame,) = media.stream_frames(tmp_path / "still.gif", 25)
    assert frame.shape == (32, 48, 3)
    assert len(list(media.stream_frames(tmp_path / "moving.gif", 25))) == 3
    for name in ("missing.png", "text.png"):
        (tmp_path / "text.png").write_text("not an image")
        with pytest.raises(MediaError, match=name):
            list(media.stream_frames(tmp_path / name, 25))


@pytest.mark.parametrize("audio_from", [0.0, 0.25])
def test_an_audio_track_starts_with_the_video(tmp_path, audio_from):
    write_timed(tmp_path / "v.mkv", range(0, 200, 4), audio_from=audio_from)
    track = media.read_audio(tmp_path / "v.mkv")
    assert abs(np.flatnonzero(track)[0] / 16000 - audio_from) < 0.002
    write_timed(tmp_path / "late.mkv", range(50, 250, 4), audio_from=audio_from)
    assert abs(media.read_audio(tmp_path / "late.mkv").size / 16000 - (0.5 + audio_from)) < 0.002


def test_a_lossless_video_keeps_every_pixel(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)
    media.write_video(tmp_path / "v.mp4", frames, 25, lossless=True)
    assert np.array_equal(media.read_video(tmp_path / "v.mp4")[0], frames)


@pytest.mark.parametrize("fps", [23, Fraction(24000, 1001), 50])
def test_the_frame_rate_of_a_video_is_exact(tmp_path, fps):
    media.write_video(tmp_path / "v.mp4", np.zeros((30, 32, 48, 3), np.uint8), fps)
    assert media.probe_video(tmp_path / "v.mp4").fps == fps
