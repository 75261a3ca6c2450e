"""Captions of videos: the spellings of side files, and the videos that captions belong to."""

import json

import pytest

from fantasy_jax.errors import ConfigError
from fantasy_jax.prepare.captions import match_captions, read_captions

ROWS = {"a.mp4": "A woman, talking.", "deep/b.mp4": 'A man says "hello".'}
CELLS = [{"file_name": name, "prompt": prompt} for name, prompt in ROWS.items()]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.csv", 'file_name,prompt\na.mp4,"A woman, talking."\ndeep/b.mp4,"A man says ""hello""."\n'),
        ("c.jsonl", "\n".join(map(json.dumps, CELLS))),
        ("c.json", json.dumps(CELLS)),
        ("c.json", json.dumps(ROWS | {"c.mp4": None, "d.mp4": " "})),
        # As published: columns that are not needed, and some without a name.
        (
            "c.csv",
            "path,clip_id,caption,blur_min,,\n"
            'a.mp4,a,"A woman, talking.",1,,\ndeep/b.mp4,b,A man says "hello".,2,,\nc.mp4,c',
        ),
    ],
)
def test_captions_are_read(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_captions(tmp_path / name) == ROWS


def test_captions_are_read_from_text_files_beside_the_videos(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("A woman, talking.\n")
    (tmp_path / "deep/b.txt").write_text('A man says "hello".')
    assert match_captions(read_captions(tmp_path), ["a.mp4", "deep/b.mp4"]) == (ROWS, {})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("other.csv", "clip,caption\na.mp4,x\n", "no column names the video .*; found clip, caption"),
        ("none.csv", "path,score\na.mp4,x\n", "one column of captions .*; found path, score"),
        (
            "both.csv",
            "path,caption,text\na.mp4,x,y\n",
            "one column of captions .*; found path, caption, text",
        ),
        ("twice.csv", "file_name,prompt\na.mp4,x\na.mp4,y\n", r"line 3 has a second caption for a\.mp4"),
        (
            "short.jsonl",
            '{"path": "a.mp4", "text": "x"}\n{"text": "y"}',
            "line 2 has no text as path or text",
        ),
        ("number.json", '[{"path": "a.mp4", "text": 3}]', "entry 1 has no text"),
        ("broken.jsonl", "{", "broken"),
        ("list.jsonl", "[1]", "line 1"),
        ("number.json", "1", "list of objects"),
        ("c.txt", "", "captions"),
        ("missing.csv", None, "cannot be read"),
        ("blank.csv", "file_name,prompt\na.mp4,\n", "holds no caption"),
        (".", None, "holds no caption"),
    ],
)
def test_wrong_side_files_are_refused_in_one_line(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_captions(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spelled", "names", "expected"),
    [
        ("deep/b.mp4", ["a.mp4", "deep/c.mp4"], "no such video; did you mean deep/c.mp4"),
        ("a.mp4", ["a.mp4", "deep/a.mp4"], "a.mp4"),
        ("clips/part_001/f6/05/f605", ["part_001/f6/05/f605.mp4"], "part_001/f6/05/f605.mp4"),
        ("f605.mp4", ["videos/f605.mkv"], "videos/f605.mkv"),
        ("/data/x/f605.mp4", ["x/f605.mp4", "y/f605.mp4"], "x/f605.mp4"),
        ("f605", ["x/f605.mp4", "y/f605.mp4"], "may belong to x/f605.mp4 or y/f605.mp4"),
        ("605.mp4", ["f605.mp4"], "no such video"),
    ],
)
def test_captions_belong_to_videos(spelled, names, expected):
    matched, messages = match_captions({spelled: "x"}, names)
    if expected in names:
        assert (matched, messages) == ({expected: "x"}, {})
    else:
        assert matched == {}
        assert expected in messages[spelled]


def test_a_second_caption_of_a_video_is_reported():
    matched, messages = match_captions({"x/a.mp4": "one", "y/a.mp4": "two"}, ["a.mp4"])
    assert matched == {"a.mp4": "one"}
    assert "another caption for a.mp4" in messages["y/a.mp4"]
