"""Images as phones and editors write them: colour profiles, HEIC and AVIF, very large ones."""

import struct
import zlib

import numpy as np
import pytest
from helpers import DATA
from PIL import Image, ImageCms
from real_people import case_file
from test_media_video import hlg, pq

from fantasy_jax import media
from fantasy_jax.errors import MediaError

SRGB = ((0.64, 0.33), (0.3, 0.6), (0.15, 0.06))
P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
BT2020 = ((0.708, 0.292), (0.17, 0.797), (0.131, 0.046))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
PROPHOTO = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001))
D65, D50 = (0.3127, 0.3290), (0.3457, 0.3585)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def xyz(chromaticity):
    x, y = chromaticity
    return np.array([x / y, 1, (1 - x - y) / y])


def to_d50(primaries, white):
    """The matrix from linear RGB to XYZ relative to D50, as in profiles."""
    columns = np.stack([xyz(x) for x in primaries], axis=1)
    columns = columns * np.linalg.solve(columns, xyz(white))
    scale = (BRADFORD @ xyz(D50)) / (BRADFORD @ xyz(white))
    return np.linalg.inv(BRADFORD) @ np.diag(scale) @ BRADFORD @ columns


def profile(space, tags, kind=b"mntr"):
    """An ICC profile of version 2."""
    body, table = b"", struct.pack(">I", len(tags))
    for name, content in tags:
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content
    connection = b"XYZ " if kind == b"mntr" else b"Lab "
    header = struct.pack(">I4xI4s4s4s12x4s28x", 132 + 12 * len(tags) + len(body), 0x02400000, kind, space,
                         connection, b"acsp")  # fmt: skip
    return header + struct.pack(">iii", 63190, 65536, 54061) + bytes(48) + table + body


DESCRIPTION = [(b"desc", b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78))]


def matrix_profile(matrix, gamma):
    def point(value):
        return b"XYZ " + bytes(4) + struct.pack(">iii", *np.round(value * 65536).astype(int))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    colours = [
        (name, point(column)) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T, strict=True)
    ]
    curves = [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    return profile(b"RGB ", [*DESCRIPTION, (b"wtpt", point(xyz(D50))), *colours, *curves])


def colours():
    """Patches of sRGB, no channel of which is near 0 or 255."""
    return np.random.default_rng(0).integers(60, 200, (4, 6, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)


def linear(values):
    values = values / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize(
    ("primaries", "white", "gamma"), [(P3, D65, 2.2), (ADOBE_RGB, D65, 563 / 256), (PROPHOTO, D50, 1.8)]
)
def test_colours_of_a_profile_become_srgb(tmp_path, primaries, white, gamma, mode):
    matrix = to_d50(primaries, white)
    wide = np.linalg.solve(matrix, to_d50(SRGB, D65) @ linear(colours())[..., None])[..., 0] ** (1 / gamma)
    stored = Image.fromarray((255 * wide).round().astype(np.uint8))
    stored = stored.quantize(24) if mode == "P" else stored.convert(mode)
    stored.save(tmp_path / "wide.png", icc_profile=matrix_profile(matrix, gamma))
    read = np.asarray(media.read_image(tmp_path / "wide.png")).astype(int)
    assert np.abs(np.asarray(stored.convert("RGB")).astype(int) - colours()).mean() > 3
    assert np.abs(read - colours()).max() <= 3
    assert np.abs(read - colours()).mean() < 0.8


def with_cicp(path, primaries, transfer):
    """Adds PNG's chunk `cICP` after the header."""
    content, chunk = path.read_bytes(), b"cICP" + bytes([primaries, transfer, 0, 1])
    path.write_bytes(
        content[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]
    )


def wide(primaries, encode):
    """The patches of sRGB in other primaries, with this transfer function, as 8 bits."""
    light = np.linalg.solve(to_d50(primaries, D65), to_d50(SRGB, D65) @ linear(colours())[..., None])[..., 0]
    return Image.fromarray((255 * encode(light)).round().clip(0, 255).astype(np.uint8))


def srgb_curve(light):
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light.clip(0) ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(
    ("numbers", "primaries", "encode", "most"),
    [
        ((12, 13), P3, srgb_curve, 2),
        ((9, 1), BT2020, srgb_curve, 3),
        ((9, 16), BT2020, lambda light: pq(203 * light), 12),
        ((9, 18), BT2020, lambda light: hlg(0.26496 * light), 6),
        ((12, 16), P3, lambda light: pq(203 * light), 12),
        ((12, 18), P3, lambda light: hlg(0.26496 * light), 6),
        ((1, 16), SRGB, lambda light: pq(203 * light), 12),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_that_a_png_states_by_numbers_become_srgb(tmp_path, numbers, primaries, encode, most, mode):
    wide(primaries, encode).convert(mode).save(tmp_path / "w.png")
    with_cicp(tmp_path / "w.png", *numbers)
    assert np.abs(np.asarray(media.read_image(tmp_path / "w.png")).astype(int) - colours()).max() <= most


@pytest.mark.parametrize(("numbers", "known"), [((1, 13), True), ((12, 13), True), ((9, 4), False)])
def test_numbers_of_a_png_have_precedence_over_its_profile_if_they_are_known(tmp_path, numbers, known):
    content = matrix_profile(to_d50(ADOBE_RGB, D65), 563 / 256)

    def read(name, content, numbers):
        Image.fromarray(colours()).save(tmp_path / name, icc_profile=content)
        if numbers:
            with_cicp(tmp_path / name, *numbers)
        return np.asarray(media.read_image(tmp_path / name))

    numbered, profiled = read("n.png", b"", numbers), read("p.png", content, None)
    assert not np.array_equal(numbered, profiled)
    assert np.array_equal(read("both.png", content, numbers), numbered if known else profiled)


@pytest.mark.parametrize("numbers", [(1, 13), (1, 6), (2, 2), (200, 13), (9, 4), (12, 2)])
def test_numbers_of_srgb_and_unknown_ones_change_nothing(tmp_path, numbers):
    Image.fromarray(colours()).save(tmp_path / "s.png")
    with_cicp(tmp_path / "s.png", *numbers)
    assert np.array_equal(np.asarray(media.read_image(tmp_path / "s.png")), colours())


@pytest.mark.parametrize("index", [b"R03", b"R98", None])
def test_adobe_rgb_that_only_exif_states_becomes_srgb(tmp_path, index):
    """Three directories: a pointer; the colour space and a pointer; what an uncalibrated one is."""
    entry = struct.Struct("<HHII").pack
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry(0x8769, 4, 1, 26) + bytes(4)
    exif += struct.pack("<H", 2 if index else 1) + entry(0xA001, 3, 1, 65535)
    if index:
        exif += entry(0xA005, 4, 1, 56) + bytes(4) + struct.pack("<HHHI", 1, 1, 2, 4) + index + b"\0"
    stored = wide(ADOBE_RGB, lambda light: light.clip(0) ** (256 / 563))
    stored.save(tmp_path / "a.png", exif=exif + bytes(4))
    expected = colours() if index == b"R03" else np.asarray(stored)
    assert np.abs(np.asarray(media.read_image(tmp_path / "a.png")).astype(int) - expected).max() <= 2


def test_display_p3_of_a_heic_file_without_a_profile(tmp_path):
    stored = wide(P3, srgb_curve)
    stored.save(tmp_path / "p.heic", quality=-1, chroma=444, color_primaries=12, transfer_characteristics=13,
                matrix_coefficients=0, full_range_flag=1)  # fmt: skip
    read = np.asarray(media.read_image(tmp_path / "p.heic")).astype(int)
    assert np.abs(read - colours()).mean() <= 2


def test_a_phones_picture_in_display_p3():
    read, base = (media.read_image(case_file(name)) for name in ("p3.png", "base.png"))
    assert np.abs(np.asarray(read).astype(int) - np.asarray(base)).mean() < 0.5


def test_a_profile_of_srgb_changes_nothing(tmp_path):
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "s.png", icc_profile=content)
    assert np.array_equal(np.asarray(media.read_image(tmp_path / "s.png")), noise)


def test_a_profile_of_cmyk(tmp_path):
    """A table of two levels for each ink, the corners of which say what the inks look like."""
    corners = np.zeros((2, 2, 2, 2, 3))  # Lab by cyan, magenta, yellow, black
    corners[..., 0] = 95 - 30 * np.indices((2, 2, 2, 2))[:3].sum(0)
    corners[1, :, :, 0] += (0, -36, -50)
    corners[..., 1, :] = 0
    cube = (corners * (2.55, 1, 1) + (0, 128, 128)).round().clip(0, 255).astype(np.uint8)
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel().tolist())
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * identity + cube.tobytes() + 3 * identity
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    content = profile(b"CMYK", [*DESCRIPTION, (b"wtpt", white), (b"A2B0", table), (b"A2B1", table)], b"prtr")
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    image.save(tmp_path / "c.jpg", quality=100, icc_profile=content)
    image.save(tmp_path / "plain.jpg", quality=100)
    # 65, -36, -50 in CIE Lab of D50 is this in sRGB (by Bradford's adaptation); without a profile cyan is.
    lab = np.array([65, -36, -50])
    f = (lab[0] + 16) / 116 + np.array([lab[1] / 500, 0, -lab[2] / 200])
    light = np.linalg.solve(to_d50(SRGB, D65), xyz(D50) * np.where(f > 6 / 29, f**3, (f - 4 / 29) / 7.787))
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light.clip(0) ** (1 / 2.4) - 0.055)
    read = np.asarray(media.read_image(tmp_path / "c.jpg"))[8, 8]
    assert np.abs(read - expected.clip(0, 255)).max() <= 4
    assert np.asarray(media.read_image(tmp_path / "plain.jpg"))[8, 8].tolist() == [0, 255, 255]


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_with_a_profile_stays_grey(tmp_path, mode, caplog):
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 256)  # linear light
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    content = profile(b"GRAY", [*DESCRIPTION, (b"wtpt", white), (b"kTRC", curve)])
    level = 55 * 257 if mode == "I;16" else 55
    Image.new(mode, (8, 8), (level, 255) if mode == "LA" else level).save(
        tmp_path / "g.png", icc_profile=content
    )
    read = np.asarray(media.read_image(tmp_path / "g.png"))
    assert np.abs(read - 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)).max() <= 1
    assert not caplog.messages


@pytest.mark.parametrize("content", [b"no profile", matrix_profile(to_d50(P3, D65), 2.2)[:150], bytes(400)])
def test_a_broken_profile_is_passed_over_aloud(tmp_path, content, caplog):
    Image.fromarray(colours()).save(tmp_path / "b.png", icc_profile=content)
    assert np.array_equal(np.asarray(media.read_image(tmp_path / "b.png")), colours())
    assert "profile" in caplog.text
    assert "\n" not in caplog.messages[0]


def test_transparency_survives_a_profile(tmp_path):
    content = matrix_profile(to_d50(P3, D65), 2.2)
    Image.new("RGBA", (8, 8), (200, 120, 40, 0)).save(tmp_path / "t.png", icc_profile=content)
    assert np.asarray(media.read_image(tmp_path / "t.png")).min() == 255


def test_pictures_of_phones_in_heic_and_avif(tmp_path):
    """HEIC in Display P3, stored on its side; AVIF as Pillow writes it."""
    turned = np.asarray(media.read_image(DATA / "pictures/turned_p3.heic")).astype(int)
    assert turned.shape == (64, 48, 3)
    for row, column, expected in ((8, 8, (47, 60, 199)), (8, 40, (214, 115, 0)), (56, 8, (230, 230, 230))):
        assert np.abs(turned[row, column] - expected).max() <= 4
    (frame,) = media.stream_frames(DATA / "pictures/turned_p3.heic", 25)
    assert np.array_equal(frame, turned)
    Image.fromarray(colours()).save(tmp_path / "p.avif", quality=100, subsampling="4:4:4")
    assert np.abs(np.asarray(media.read_image(tmp_path / "p.avif")).astype(int) - colours()).mean() < 3
    whole = (DATA / "pictures/turned_p3.heic").read_bytes()
    (tmp_path / "cut.heic").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(MediaError, match=r"cut\.heic") as raised:
        media.read_image(tmp_path / "cut.heic")
    assert "\n" not in str(raised.value)


def test_a_very_large_picture_is_read_at_a_reduced_size(tmp_path, caplog, monkeypatch):
    """As one of 200 megapixels is, by a limit that a small one exceeds."""
    gradient = np.linspace(0, 250, 400).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(gradient[:, None], (400, 300)))
    monkeypatch.setattr("fantasy_jax.media.images._KEPT", 10_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, mode in (("l.jpg", "RGB"), ("l.png", "P"), ("l16.png", "I;16"), ("l.webp", "RGB")):
        stored = (
            Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
            if mode == "I;16"
            else image.convert(mode)
        )
        stored.save(tmp_path / name, exif=exif)
        read = np.asarray(media.read_image(tmp_path / name))
        assert read.shape in ((75, 100, 3), (76, 101, 3), (38, 50, 3))
        rows = np.linspace(250, 0, read.shape[1])
        assert np.abs(read[..., 0] - rows).max() < 8
        assert f"{name}: 300 x 400 pixels are read as" in caplog.text
    assert Image.MAX_IMAGE_PIXELS == 30_000
    monkeypatch.setattr("fantasy_jax.media.images._DECODABLE", 50_000)
    assert media.read_image(tmp_path / "l.jpg").width < 110
    with pytest.raises(MediaError, match=r"l\.png: 300 x 400 pixels are too many"):
        media.read_image(tmp_path / "l.png")


@pytest.mark.slow
def test_200_megapixels(tmp_path):
    """What the largest sensors of phones store."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(noise).resize((16320, 12240)).save(tmp_path / "p.jpg")
    read = media.read_image(tmp_path / "p.jpg")
    assert 10_000_000 < read.width * read.height < 51_000_000
    assert np.abs(np.asarray(read.resize((16, 12), Image.Resampling.BOX)).astype(int) - noise).mean() < 40
