"""Sound on the time axis of its file: holes, damage, changes inside, layouts, channels that cancel."""

import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from real_people import case_file

from fantasy_jax import media
from fantasy_jax.errors import MediaError
from fantasy_jax.media.audio import stream_audio
from fantasy_jax.media.decoding import SoundReport, placed_sound
from fantasy_jax.pipelines.sounds import read_sounds

RATE = 48_000


def clicks(*times, seconds=3.0, rate=RATE, channels=1):
    """A quiet tone with bursts of 5 ms."""
    time = np.arange(round(seconds * rate)) / rate
    tone = 0.02 * np.sin(2 * np.pi * 200 * time)
    for start in times:
        tone += 0.7 * np.sin(2 * np.pi * 1500 * time) * ((time >= start) & (time < start + 0.005))
    return np.stack([tone.astype(np.float32)] * channels)


def times_of(waveform, rate=16_000):
    """Where bursts begin, in seconds."""
    loud = np.flatnonzero(np.abs(waveform) > 0.25)
    return (loud[np.insert(np.diff(loud) > 0.05 * rate, 0, True)] / rate).tolist()


def encode(path, samples, codec, rate=RATE, *, layout=None, lost=(), container=None, video=True, late=0.0):
    """Writes sound whose packets are lost in some spans of time, beside a video of three seconds."""
    layout = layout or ("mono" if len(samples) == 1 else "stereo")
    with av.open(str(path), "w", format=container) as output:
        picture = output.add_stream("libx264", rate=25) if video else None
        stream = output.add_stream(codec, rate=rate)
        stream.layout = layout
        if video:
            picture.height = picture.width = 16
            picture.pix_fmt = "yuv420p"
            for _ in range(75):
                frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
                output.mux(picture.encode(frame))
            output.mux(picture.encode(None))
        packed = np.ascontiguousarray(samples.T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(late * rate)
        resampler = av.AudioResampler(stream.format, layout, rate, frame_size=stream.frame_size or 1024)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            for packet in stream.encode(part):
                time = float((packet.pts or 0) * packet.time_base)
                if not any(start <= time < end for start, end in lost):
                    output.mux(packet)
    return path


@pytest.mark.parametrize(
    ("name", "codec"),
    [("v.mkv", "aac"), ("v.mkv", "libopus"), ("v.mkv", "pcm_s16le"), ("v.ts", "mp2"), ("v.flv", "aac"),
     ("v.mov", "aac"), ("v.mka", "flac")],
)  # fmt: skip
def test_holes_are_silence_so_that_the_rest_keeps_its_time(tmp_path, name, codec):
    lost = ((0.9, 1.4), (1.7, 1.72))
    path = encode(tmp_path / name, clicks(0.5, 1.1, 1.6, 2.5), codec, lost=lost, video=name != "v.mka")
    track = media.read_audio_track(path)
    assert times_of(track.waveform) == pytest.approx([0.5, 1.6, 2.5], abs=0.02)
    assert media.audio_seconds(path) == pytest.approx(3.0, abs=0.05)
    assert np.abs(track.waveform[int(16_000 * 0.98) : int(16_000 * 1.32)]).max() < 1e-3
    (start, end), *_ = track.missing[track.missing[:, 0] > 0.1]
    assert (start, end) == pytest.approx((0.9, 1.4), abs=0.1)
    stereo = np.concatenate(list(stream_audio(path, 44_100)), axis=1)
    assert times_of(stereo[1], 44_100) == pytest.approx([0.5, 1.6, 2.5], abs=0.02)


def test_the_hole_of_a_recorded_file(caplog):
    track = media.read_audio_track(case_file("gap.mkv"))
    assert times_of(track.waveform)[0] == pytest.approx(2.0, abs=0.02)
    assert "0.51 s of the audio are missing" in caplog.text


@pytest.mark.parametrize("late", [0.0, 0.4])
def test_sound_that_begins_late_is_placed_beside_the_video(tmp_path, late, caplog):
    path = encode(tmp_path / "v.mkv", clicks(0.5, 2.0), "aac", late=late)
    assert times_of(media.read_audio(path)) == pytest.approx([0.5 + late, 2.0 + late], abs=0.03)
    assert not caplog.messages
    alone = encode(tmp_path / "a.mka", clicks(0.5, 2.0), "aac", late=late, video=False)
    assert times_of(media.read_audio(alone)) == pytest.approx([0.5, 2.0], abs=0.03)


def test_a_clock_that_starts_again_neither_loses_sound_nor_inserts_hours(tmp_path):
    """Two transport streams, one behind the other, and a timestamp far ahead."""
    for number, late in enumerate((0.0, 30_000.0)):
        encode(tmp_path / f"{number}.ts", clicks(0.5), "mp2", late=late, video=False)
    both = tmp_path / "both.ts"
    first, far = ((tmp_path / f"{number}.ts").read_bytes() for number in range(2))
    for content in (first + first, first + far):
        both.write_bytes(content)
        assert times_of(media.read_audio(both)) == pytest.approx([0.5, 3.5], abs=0.1)


def joined(path, *parts):
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


@pytest.mark.parametrize(("suffix", "codec"), [("mp3", "libmp3lame"), ("aac", "aac"), ("ts", "mp2")])
@pytest.mark.parametrize("second", [(44_100, 1), (RATE, 2), (22_050, 2)])
def test_rate_and_channels_may_change_inside(tmp_path, suffix, codec, second):
    parts = [
        encode(tmp_path / f"{i}.{suffix}", clicks(0.5, seconds=1, rate=rate, channels=channels), codec, rate,
               video=False)
        for i, (rate, channels) in enumerate([(RATE, 1), second, (RATE, 1)])
    ]  # fmt: skip
    lengths = [media.read_audio(part).size / 16_000 for part in parts]
    path = joined(tmp_path / f"all.{suffix}", *parts)
    read = media.read_audio(path)
    assert read.size / 16_000 == pytest.approx(sum(lengths), abs=0.2)  # MP3 and AAC begin with silence
    starts = [sum(lengths[:i]) for i in range(3)]
    assert times_of(read) == pytest.approx([start + 0.53 for start in starts], abs=0.15)
    spectrum = np.abs(np.fft.rfft(read[-12_000:-4000]))
    assert spectrum.argmax() * 16_000 / 8000 == pytest.approx(200, abs=4)
    stereo = np.concatenate(list(stream_audio(path, 44_100)), axis=1)
    assert stereo.shape[1] / 44_100 == pytest.approx(read.size / 16_000, abs=0.01)
    assert media.audio_seconds(path) == pytest.approx(read.size / 16_000, abs=0.01)


@pytest.mark.parametrize(("name", "seconds"), [("rate_raw.mp3", 0.776), ("ch_raw.mp3", 0.768)])
def test_recorded_files_that_change_inside(name, seconds, tmp_path):
    read = media.read_audio(case_file(name))
    assert read.size / 16_000 == pytest.approx(seconds, abs=0.001)
    media.write_video(tmp_path / "v.mp4", np.zeros((19, 16, 16, 3), np.uint8), 25, audio=case_file(name))
    assert np.abs(media.read_audio(tmp_path / "v.mp4")).max() > 0.1


def damaged(path, target, spans):
    """Copies a file with these spans of sound overwritten."""
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(0)
    with av.open(str(path)) as container:
        for packet in container.demux(audio=0):
            time = None if packet.pts is None else float(packet.pts * packet.time_base)
            if time is not None and any(start <= time < end for start, end in spans):
                place = content.find(bytes(packet))
                content[place + 1 : place + packet.size] = random.bytes(packet.size - 1)
                content[place] = 0xFF
    target.write_bytes(content)
    return target


@pytest.mark.parametrize(("name", "codec"), [("v.mp4", "aac"), ("v.mkv", "aac"), ("v.mkv", "flac")])
def test_damaged_packets_are_silence_and_said(tmp_path, name, codec, caplog):
    whole = encode(tmp_path / f"whole{name}", clicks(0.5, 2.5), codec)
    path = damaged(whole, tmp_path / name, [(1.0, 1.1)])
    track = media.read_audio_track(path)
    loud = times_of(np.where(np.abs(np.arange(track.waveform.size) / 16_000 - 1.05) < 0.2, 0, track.waveform))
    assert loud == pytest.approx([0.5, 2.5], abs=0.02)
    assert track.waveform.size == pytest.approx(media.read_audio(whole).size, abs=400)
    assert "damaged" in caplog.text
    assert "\n" not in caplog.text.strip()
    media.write_video(tmp_path / "out.mp4", np.zeros((75, 16, 16, 3), np.uint8), 25, audio=path)
    much = damaged(whole, tmp_path / f"much{name}", [(0.2, 1.8)])
    with pytest.raises(MediaError, match=r"at most 25% may be damaged|not readable"):
        media.read_audio(much)


@pytest.mark.parametrize(("name", "where"), [("joined_same.mp3", 0.361), ("dam0.mp4", 0.882)])
def test_recorded_files_of_which_one_packet_does_not_decode(name, where, caplog):
    ((start, end),) = media.read_audio_track(case_file(name)).missing
    assert start == pytest.approx(where, abs=0.002)
    assert 0.02 < end - start < 0.03
    assert "0.02 s of the audio are damaged and silent" in caplog.text


def write_wav(path, samples, rate=RATE):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.T * 32767).round().astype("<i2").tobytes())
    return path


@pytest.mark.parametrize("rate", [1, 999, 1_000_001, 2**31 - 1])
def test_a_sound_of_an_unusual_rate_is_refused(tmp_path, rate):
    path = write_wav(tmp_path / "t.wav", clicks(seconds=0.01), rate)
    for read in (media.read_audio, media.audio_seconds, lambda path: list(stream_audio(path, RATE))):
        with pytest.raises(MediaError, match=rf"t\.wav: has {rate} samples a second"):
            read(path)


def test_values_that_are_not_finite_are_damage(tmp_path):
    samples = clicks(0.5, 2.5)
    samples[:, 60_000:61_000] = np.nan
    path = encode(tmp_path / "n.wav", samples, "pcm_f32le", video=False)
    track = media.read_audio_track(path)
    assert times_of(track.waveform) == pytest.approx([0.5, 2.5], abs=0.01)
    assert len(track.missing)


def voice(seconds=2.0, seed=0):
    """Noise of a slowly varying level, never far from zero for long."""
    random = np.random.default_rng(seed)
    return (0.2 * random.standard_normal(round(seconds * RATE))).astype(np.float32).clip(-0.9, 0.9)


@pytest.mark.parametrize("gain", [-1.0, -0.7])
def test_a_channel_that_cancels_the_other(tmp_path, gain, caplog):
    left = voice()
    path = write_wav(tmp_path / "a.wav", np.stack([left, gain * left]))
    expected = media.read_audio(write_wav(tmp_path / "l.wav", left[None]))
    assert np.abs(media.read_audio(path) - expected).max() < 1e-3
    assert "cancel" in caplog.text


def test_a_recording_whose_channels_cancel():
    assert np.sqrt(np.square(media.read_audio(case_file("antiphase.wav"))).mean()) > 0.02


def test_channels_that_cancel_for_a_while_only(tmp_path):
    left = voice(6.0)
    right = left.copy()
    right[2 * RATE : 4 * RATE] *= -1
    read = media.read_audio(write_wav(tmp_path / "a.wav", np.stack([left, right])))
    wrong = np.abs(read - media.read_audio(write_wav(tmp_path / "l.wav", left[None]))) > 1e-3
    places = np.flatnonzero(wrong) / 16_000
    assert np.minimum(np.abs(places - 2), np.abs(places - 4)).max() < 0.3


@pytest.mark.parametrize("right", [voice(seed=1), np.zeros(2 * RATE, np.float32), 0.5 * voice()])
def test_other_channels_are_averaged(tmp_path, right, caplog):
    path = write_wav(tmp_path / "a.wav", np.stack([voice(), right]))
    mean = media.read_audio(write_wav(tmp_path / "m.wav", (voice() + right)[None] / 2))
    assert np.abs(media.read_audio(path) - mean).max() < 1e-3
    assert not caplog.messages


@pytest.mark.parametrize(
    ("layout", "channels", "expected"),
    [("5.1", {2: 1}, 0.7071), ("5.1", {0: 1}, 0.5), ("5.1", {3: 1}, 0), ("5.1", {4: 1}, 0.3536),
     ("5.1(side)", {2: 1}, 0.7071), ("7.1", {2: 1}, 0.7071), ("7.1", {3: 1}, 0), ("quad", {3: 1}, 0.3536),
     ("4.0", {2: 1}, 0.7071), ("5.1", {0: 1, 1: -1}, 1.0)],
)  # fmt: skip
def test_more_channels_are_mixed_by_the_standard(tmp_path, layout, channels, expected):
    count = av.AudioLayout(layout).nb_channels
    samples = np.zeros((count, 2 * RATE), np.float32)
    for channel, gain in channels.items():
        samples[channel] = gain * voice()
    path = encode(tmp_path / "s.wav", samples, "pcm_s16le", layout=layout, video=False)
    alone = media.read_audio(write_wav(tmp_path / "v.wav", voice()[None]))
    assert np.abs(media.read_audio(path) - expected * alone).max() < 2e-3


def test_a_voice_in_the_centre_of_music():
    """The voice is 3 dB below its level in the file, as the standard has it."""
    with av.open(str(case_file("c51_music.wav"))) as container:
        stored = np.concatenate(
            [x.to_ndarray().reshape(-1, 6) for x in container.decode(audio=0)]
        ) / 2.0**31  # fmt: skip
    front, centre, back = stored[:, :2].mean(1), stored[:, 2], stored[:, 4:].mean(1)
    mixed = (front + np.sqrt(0.5) * (centre + back)).astype(np.float32)
    expected = media.resample(mixed, RATE)
    assert np.abs(media.read_audio(case_file("c51_music.wav")) - expected).max() < 1e-3


@pytest.mark.parametrize("samples", [1, 160, 399])
def test_sound_shorter_than_a_window_is_one_line(tmp_path, samples):
    path = write_wav(tmp_path / "t.wav", np.full((1, samples), 0.1), 16_000)
    with pytest.raises(MediaError, match=r"^\S*t\.wav: lasts .*; at least 0\.025 s are needed$"):
        read_sounds(str(path))


def test_a_recording_of_ten_milliseconds():
    with pytest.raises(MediaError, match="at least"):
        read_sounds(str(case_file("tiny10ms.wav")))


def test_only_what_is_used_is_decoded(tmp_path):
    path = write_wav(tmp_path / "long.wav", np.tile(clicks(0.5, channels=2), 20))
    report = SoundReport()
    pieces = placed_sound(path, report)
    next(pieces)
    assert report.seconds < 1
    read = media.read_audio(path, start=30.25, seconds=2.0)
    assert 2 * 16_000 <= read.size < 3.5 * 16_000
    assert times_of(read)[0] == pytest.approx(0.25, abs=0.01)
    with pytest.raises(MediaError, match=r"lasts 60\.00 s; nothing is left from 70 s on"):
        media.read_audio(path, start=70.0)
    part = media.AudioPart(path, 30.25, 1.0)
    stereo = np.concatenate(list(stream_audio(part, 44_100)), axis=1)
    assert stereo.shape == (2, 44_100)
    assert times_of(stereo[0], 44_100) == pytest.approx([0.25], abs=0.01)


def test_titles_need_not_be_text(tmp_path):
    """Names of songs are often in another encoding than the file says."""
    path = encode(tmp_path / "t.mkv", clicks(0.5), "aac")
    with av.open(str(path)) as source, av.open(str(tmp_path / "named.mkv"), "w") as target:
        target.metadata["title"] = "a title that is long enough"
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                if not target.streams:
                    stream = target.add_stream_from_template(source.streams.audio[0])
                packet.stream = stream
                target.mux(packet)
    content = (tmp_path / "named.mkv").read_bytes().replace(b"a title that", b"\xe4 title th\xe4t")
    (tmp_path / "named.mkv").write_bytes(content)
    assert times_of(media.read_audio(tmp_path / "named.mkv")) == pytest.approx([0.5], abs=0.03)
