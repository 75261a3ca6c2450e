"""Videos as phones and other programs write them: display matrices, colour spaces, high dynamic range."""

from itertools import product

import av
import numpy as np
import pytest
from PIL import Image
from real_people import case_file

from fantasy_jax import media
from fantasy_jax.errors import MediaError

PATCHES = np.array([(220, 170, 140), (120, 70, 50), (30, 60, 200), (40, 160, 60), (200, 40, 40), (128,) * 3])
"""Skin, brown, blue, green, red and grey, as in the recorded files."""
SIGNS = list(product((-1, 1), repeat=2))
MATRICES = [*((a, 0, 0, d) for a, d in SIGNS), *((0, b, c, 0) for b, c in SIGNS)]


def patches(height=48, width=96):
    return np.broadcast_to(PATCHES.astype(np.uint8).repeat(width // 6, 0), (height, width, 3))


def difference(frame):
    """Largest difference from the patches, in the middle of each."""
    places = (np.arange(6) + 0.5) * frame.shape[1] / 6
    return int(np.abs(frame[len(frame) // 2, places.astype(int)].astype(int) - PATCHES).max())


def every_reader(path):
    """The first frame by each way of reading it."""
    yield media.read_video(path)[0][0]
    yield next(media.stream_video(path, 25))[1]
    yield next(media.stream_frames(path, 25))


def displayed(stored, matrix):
    """What FFmpeg's display matrix makes of a picture, pixel by pixel."""
    a, b, c, d = matrix
    height, width = stored.shape[:2]
    y, x = np.mgrid[:height, :width]
    columns, rows = a * x + c * y, b * x + d * y
    columns, rows = columns - columns.min(), rows - rows.min()
    shown = np.zeros((rows.max() + 1, columns.max() + 1, 3), np.uint8)
    shown[rows, columns] = stored
    return shown


@pytest.mark.parametrize("matrix", MATRICES)
def test_the_whole_display_matrix_is_applied(tmp_path, matrix):
    stored = np.full((32, 48, 3), 230, np.uint8)
    stored[:16, :24], stored[:16, 24:], stored[16:, :24] = (200, 30, 30), (30, 200, 30), (30, 30, 200)
    stored[2:10, 4:12] = (250, 220, 10)
    media.write_video(tmp_path / "v.mp4", np.stack([stored] * 3), 25)
    content = bytearray((tmp_path / "v.mp4").read_bytes())
    place = content.index(b"tkhd") + 44
    for index, value in zip((0, 4, 12, 16), matrix, strict=True):
        content[place + index : place + index + 4] = (65536 * value).to_bytes(4, "big", signed=True)
    (tmp_path / "v.mp4").write_bytes(content)
    expected = displayed(stored, matrix).astype(int)
    info = media.probe_video(tmp_path / "v.mp4")
    assert (info.height, info.width) == expected.shape[:2]
    for frame in every_reader(tmp_path / "v.mp4"):
        assert frame.shape == expected.shape
        assert np.abs(frame - expected).mean() < 4
    _, small = next(media.stream_video(tmp_path / "v.mp4", 25, (16, 16)))
    shrunk = Image.fromarray(expected.astype(np.uint8)).resize((16, 16), Image.Resampling.BOX)
    assert np.abs(small.astype(int) - np.asarray(shrunk)).mean() < 8


def test_a_front_cameras_file():
    for frame in every_reader(case_file("hflip.mp4")):
        corners = frame[[40, 40, 260, 260], [40, 200, 40, 200]].astype(int)
        expected = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (230, 230, 230)]
        assert np.abs(corners - expected).max() < 12
        rows, columns = np.nonzero((frame[..., 0] > 220) & (frame[..., 1] > 180) & (frame[..., 2] < 80))
        assert rows.mean() < 160
        assert columns.mean() < 125


def test_recorded_colours():
    """BT.709 exactly, HLG tone-mapped, scaled or not."""
    for name, most in (("b709.mp4", 2), ("hlg10.mp4", 2)):
        for frame in every_reader(case_file(name)):
            assert difference(frame) <= most
        _, small = next(media.stream_video(case_file(name), 25, (60, 96)))
        assert difference(small) <= most


def encode(path, planes, pixel_format, *, codec="libx264", **colours):
    """Writes planes of 4:4:4 as they are, with these properties of the colours."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"crf": "1"})
        stream.height, stream.width = planes.shape[1:]
        stream.pix_fmt = pixel_format
        for name, value in colours.items():
            setattr(stream.codec_context, name, value)
        for _ in range(3):
            frame = av.VideoFrame(planes.shape[2], planes.shape[1], pixel_format)
            for plane, values in zip(frame.planes, planes, strict=True):
                rows = np.zeros((plane.height, plane.line_size // values.itemsize), values.dtype)
                rows[:, : values.shape[1]] = values
                plane.update(rows)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def to_planes(rgb, red, blue, *, full=False, bits=8):
    """Luma and colour differences of RGB in [0, 1], by the weights of red and blue."""
    luma = rgb @ np.array([red, 1 - red - blue, blue])
    differences = (rgb[..., 2] - luma) / (2 - 2 * blue), (rgb[..., 0] - luma) / (2 - 2 * red)
    scale = 2 ** (bits - 8)
    if full:
        values = [luma * (256 * scale - 1), *(256 * scale * x + 128 * scale for x in differences)]
    else:
        values = [(219 * luma + 16) * scale, *((224 * x + 128) * scale for x in differences)]
    return np.stack(values).round().clip(0, 256 * scale - 1).astype(np.uint8 if bits == 8 else "<u2")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("matrix", "red", "blue"),
    [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (6, 0.299, 0.114), (2, 0.299, 0.114), (9, 0.2627, 0.0593)],
)
def test_matrix_and_range_are_those_of_the_file(tmp_path, matrix, red, blue, full):
    planes = to_planes(patches() / 255, red, blue, full=full)
    path = encode(tmp_path / "v.mp4", planes, "yuv444p", colorspace=matrix, color_range=2 if full else 1)
    for frame in every_reader(path):
        assert difference(frame) <= 3


def linear(values):
    values = values / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def pq(light):
    """PQ's signal of cd/m² (ITU-R BT.2100)."""
    power = (light.clip(0) / 10_000) ** (2610 / 16384)
    return ((107 / 128 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(scene):
    """HLG's signal of scene light in [0, 1] (ITU-R BT.2100)."""
    scene = scene.clip(0)
    upper = 0.17883277 * np.log(12 * scene.clip(1 / 12) - 0.28466892) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), upper)


HDR = {"pq": (16, lambda light: pq(203 * light)), "hlg": (18, lambda light: hlg(light * 0.26496))}
"""Transfer characteristics, and signals of light relative to diffuse white (ITU-R BT.2408)."""
TO_BT2020 = np.linalg.inv(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
)


@pytest.mark.parametrize("kind", HDR)
def test_high_dynamic_range_is_tone_mapped(tmp_path, kind):
    transfer, signal = HDR[kind]
    light = linear(patches()) @ TO_BT2020.T
    light[:8] = np.linspace(0, 3.5, 96)[:, None]  # a ramp of grey, up to highlights
    planes = to_planes(signal(light), 0.2627, 0.0593, bits=10)
    colours = {"colorspace": 9, "color_primaries": 9, "color_trc": transfer, "color_range": 1}
    path = encode(tmp_path / "v.mp4", planes, "yuv444p10le", **colours)
    for frame in every_reader(path):
        assert difference(frame) <= 3
        ramp = frame[4].astype(int)
        assert np.ptp(ramp, axis=1).max() <= 3  # grey stays grey
        assert (np.diff(ramp.mean(axis=1)) >= -1).all()
        white = int(96 / 3.5)
        assert 240 <= ramp[white].mean() <= 252
        assert ramp[-1].mean() >= 253


def test_what_is_written_is_bt709_and_says_so(tmp_path):
    media.write_video(tmp_path / "v.mp4", np.stack([patches()] * 3), 25)
    with av.open(str(tmp_path / "v.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = context.colorspace, context.color_primaries, context.color_trc, context.color_range
        assert [int(x) for x in tags] == [1, 1, 1, 1]
        frame = next(container.decode(video=0))
        luma = np.frombuffer(bytes(frame.planes[0]), np.uint8).reshape(frame.height, -1)[24, 8:96:16]
    assert np.abs(luma - (PATCHES / 255 @ [0.2126, 0.7152, 0.0722] * 219 + 16)).max() <= 1
    for frame in every_reader(tmp_path / "v.mp4"):
        assert difference(frame) <= 3
    media.write_video(tmp_path / "l.mp4", np.stack([patches()] * 3), 25, lossless=True)
    assert np.array_equal(media.read_video(tmp_path / "l.mp4")[0][0], patches())


def test_dolby_vision_without_a_base_layer_is_refused(tmp_path):
    planes = to_planes(patches() / 255, 0.2627, 0.0593, bits=10)
    path = encode(tmp_path / "v.mp4", planes, "yuv444p10le", codec="libx265")
    assert len(list(every_reader(path))) == 3
    content = path.read_bytes()
    assert content.count(b"hev1") == 1
    path.write_bytes(content.replace(b"hev1", b"dvh1"))
    with pytest.raises(MediaError, match="Dolby Vision"):
        media.read_video(path)
    with pytest.raises(MediaError, match="Dolby Vision"):
        media.probe_video(path)
