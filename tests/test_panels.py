"""The picture of several clips below what drives them."""

import numpy as np
import pytest
from PIL import Image

from fantasy_jax import media
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.evaluation.panels import main, parse_row, waveform

STILL = (150, 60, 200)


def test_each_clip_is_shown_below_what_drives_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sound = (2000 * np.sin(np.arange(6400) / 5)).astype(np.int16)
    media.write_audio("s.wav", sound, 16_000)
    colours = {"talk": (200, 30, 30), "act": (30, 200, 30), "one": (30, 30, 200), "other": (200, 200, 30)}
    for name, colour in colours.items():
        size = (32, 64) if name == "act" else (32, 32)
        frames = np.full((10, *size, 3), colour, np.uint8)
        media.write_video(f"{name}.mp4", frames, 25, lossless=True, audio="s.wav" if name == "talk" else None)
    Image.fromarray(np.full((48, 32, 3), STILL, np.uint8)).save("still.png")
    main(["out/demo.png", "--row=talk.mp4", "--row=act.mp4,one.mp4,other.mp4", "--row=act.mp4,still.png"])
    assert "1000 x" in capsys.readouterr().out
    drawn = np.asarray(Image.open("out/demo.png")).astype(int)

    def rows(colour):
        """First and last row that show a colour, and the number of its columns."""
        shown = np.abs(drawn - colour).max(axis=-1) < 8
        where = np.nonzero(shown.any(axis=1))[0]
        return where[0], where[-1], shown.any(axis=0).sum()

    talk, act, one, other, still = (rows(x) for x in (*colours.values(), STILL))
    assert drawn.shape[1] == 1000
    assert 30 < talk[0] < talk[1] < one[0] < one[1] < act[0] < still[0] < still[1] < act[1]
    assert one[:2] == other[:2]
    assert one[2] == other[2]
    assert 700 < talk[2] < 920
    with pytest.raises(MediaError):
        main(["out/none.png", "--row=act.mp4"])  # without sound or drivers
    with pytest.raises(ConfigError, match=r"none\.jpg"):
        main(["out/none.jpg", "--row=talk.mp4"])
    with pytest.raises(ConfigError, match="--row=a,"):
        parse_row("a,")


def test_sound_that_ends_before_the_clip_ends_in_the_picture_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sound = (2000 * np.sin(np.arange(6400) / 5)).astype(np.int16)  # 0.4 s
    media.write_audio("s.wav", sound, 16_000)
    frames = np.full((20, 32, 32, 3), (200, 30, 30), np.uint8)  # 0.8 s
    media.write_video("talk.mp4", frames, 25, lossless=True, audio="s.wav")
    main(["demo.png", "--row=talk.mp4"])
    drawn = np.asarray(Image.open("demo.png")).astype(int)[30:70, 90:]
    loud = (np.abs(drawn - (40, 100, 180)).max(axis=-1) < 8).sum(axis=0) > 5
    assert 0.4 < np.nonzero(loud)[0].max() / drawn.shape[1] < 0.6


def test_a_waveform_has_the_height_of_the_loudest_part():
    sound = np.concatenate([np.zeros(100), np.tile([0.5, -0.5], 50)])
    drawn = (waveform(sound, 10, 21) != 244).any(axis=-1).sum(axis=0)
    assert drawn.tolist() == [2] * 5 + [21] * 5 or drawn.tolist() == [1] * 5 + [21] * 5
