"""Outputs: written whole or not at all, to links, devices and pipes too, under any name, on a full disk."""

import logging
import os
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DATA, full_disk, run_convert_weights
from PIL import Image
from safetensors.numpy import load_file, save_file

import fantasy_jax
from fantasy_jax import cli, media
from fantasy_jax.errors import ConfigError, MediaError, WeightsError
from fantasy_jax.files import atomic_write, check_outputs
from fantasy_jax.pipelines.arguments import sampling_parser
from fantasy_jax.pipelines.batch import ClipRequest
from fantasy_jax.pipelines.latents import initial_noise, keep_latents, read_latents, save_latents
from fantasy_jax.pipelines.output import VideoOutput
from sample import _write_clip, main

TINY = f"--config={Path(__file__).parent.parent / 'configs/tiny.py'}"
FRAMES = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, text="new"):
    with atomic_write(path) as partial:
        partial.write_text(text)


def test_a_link_stays_and_its_target_is_replaced_at_once():
    Path("folder").mkdir()
    Path("folder/target").write_text("old")
    os.link("folder/target", "hard")
    Path("link").symlink_to("folder/target")
    Path("dangling").symlink_to("folder/none")
    for path in ("link", "dangling"):
        write(path)
    assert Path("link").is_symlink()
    assert Path("link").read_text() == Path("folder/target").read_text() == "new"
    assert Path("folder/none").read_text() == "new"
    assert Path("hard").read_text() == "old"  # the old file was not written into
    with pytest.raises(MediaError), atomic_write("link") as partial:
        partial.write_text("half" + Path("/none").read_text())
    assert Path("link").read_text() == "new"
    assert sorted(path.name for path in Path("folder").iterdir()) == ["none", "target"]


def test_devices_and_pipes_are_written_to_and_stay():
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    read = []
    for path in ("pipe", "link"):
        reader = threading.Thread(target=lambda: read.append(Path("pipe").read_text()))
        reader.start()
        write(path)
        reader.join(10)
    assert read == ["new", "new"]
    assert Path("pipe").is_fifo()
    write("/dev/null")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(MediaError, match="No space left"):
        write("/dev/full")
    check_outputs(["/dev/null", "/dev/null", "pipe"], ["/dev/null", "pipe"])


def test_a_standard_output_that_is_a_file_is_appended_to():
    with open("printed", "w") as file:
        file.write("before ")
        file.flush()
        write(f"/proc/self/fd/{file.fileno()}")
        file.seek(0, os.SEEK_END)
        file.write(" after")
    assert Path("printed").read_text() == "before new after"


def test_what_is_write_protected_is_not_replaced(monkeypatch):
    Path("mine").write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("mine"))  # root may all
    with pytest.raises(MediaError, match="protected"):
        write("mine")
    assert Path("mine").read_text() == "old"


@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [
        (["a"], ["./a"]),
        (["x/y", "x/../x/y"], []),
        (["store/net/file"], ["store/net"]),
        (["link"], ["store/net/file"]),
        (["link/file"], ["store/net"]),
        (["folder/file"], ["store/net"]),
        (["hard"], ["a"]),
        (["x/y", "x/z/../y"], []),
    ],
)
def test_no_output_is_an_input_or_another_output(outputs, inputs):
    Path("store/net").mkdir(parents=True)
    Path("store/net/file").touch()
    Path("a").touch()
    os.link("a", "hard")
    Path("link").symlink_to("store/net/file" if outputs == ["link"] else "store/net")
    Path("folder").symlink_to("store/net")
    for names in (outputs, [os.path.abspath(path) for path in outputs]):
        with pytest.raises(ConfigError, match="overwrite"):
            check_outputs(names, [None, "", *inputs])
    check_outputs(["store/net/other", None, ""], ["store/net", "a"])


@pytest.mark.parametrize(
    "name", [b"10:15.mp4", b"file:x.mp4", b"pipe:1.mp4", b"-y.mp4", b"\xff.mp4", b"%d.mov"]
)
def test_videos_and_sounds_have_any_name(name):
    name = os.fsdecode(name)
    sound = Path(name).with_suffix(".wav")
    media.write_audio(sound, np.full(8000, 9000, np.int16), 16_000)
    media.check_audio(sound)
    VideoOutput(lambda: iter(FRAMES), jnp.zeros((1, 3, 8, 8, 16)), 9, 25, str(sound)).save(
        name, sheet="s.png"
    )
    assert sorted(path.name for path in Path().iterdir()) == sorted([name, sound.name, "s.png"])
    assert media.read_video(name)[0].shape == FRAMES.shape
    assert media.probe_video(name).has_audio
    assert media.read_audio(name).size > 4000


def test_a_sheet_replaces_sheets_only():
    video = VideoOutput(lambda: iter(FRAMES), jnp.zeros((1, 3, 8, 8, 16)), 9, 25)
    media.check_sheet("v.png")
    for _ in range(2):
        video.save("v.mp4", sheet="v.png")
        media.check_sheet("v.png")
    media.check_sheet("/dev/null")
    Image.fromarray(FRAMES[0]).save("mine.png")
    Path("text.png").write_text("no picture")
    for name in ("mine.png", "text.png"):
        with pytest.raises(MediaError, match="sheet"):
            media.check_sheet(name)


def test_the_suffix_of_a_video_is_its_format():
    for name, brand in {"a.mp4": b"isom", "b.MOV": b"qt  ", "c.m4v": b"isom"}.items():
        media.write_video(name, FRAMES, 25)
        assert Path(name).read_bytes()[8:12] == brand
    for name in ("a.mkv", "a.webm", "a", ".mp4"):
        with pytest.raises(MediaError, match=r"\.mp4"):
            media.write_video(name, FRAMES, 25)


def test_sound_that_cannot_be_decoded_is_found_before_frames_are_made():
    Path("a.wav").write_bytes(b"RIFF" + bytes(100))
    with pytest.raises(MediaError, match=r"a\.wav"):
        media.check_audio("a.wav")


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**64 - 1])
def test_seeds_have_64_bits(seed):
    noise = initial_noise(seed, (1, 1, 2, 2, 4))
    assert np.isfinite(noise).all()
    others = [initial_noise(other % 2**64, noise.shape) for other in (seed + 1, seed + 2**32)]
    assert all(not np.array_equal(noise, other) for other in others)


@pytest.mark.parametrize("seed", [-1, 2**64, 10**20])
def test_seeds_of_more_bits_are_refused(seed):
    with pytest.raises(ConfigError, match="seed"):
        initial_noise(seed, (1, 1, 2, 2, 4))


def test_latents_survive_a_disk_that_is_full(capsys):
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 8, 8, 4)), jnp.float32)
    output = VideoOutput(lambda: iter(FRAMES), latents, 9, 25)
    arguments = sampling_parser("").parse_args([TINY])
    Path("v.latents.safetensors").write_text("of an earlier run")
    request = ClipRequest("a.png", ("a.wav",), "", Path("v.mp4"))
    with (
        full_disk(8000),
        pytest.raises(MediaError, match=r"File too large.*--latents=v\.2\.latents\.safetensors"),
    ):
        _write_clip(output, arguments, request)
    assert sorted(path.name for path in Path().iterdir()) == [
        "v.2.latents.safetensors",
        "v.latents.safetensors",
    ]
    kept, frames = read_latents("v.2.latents.safetensors", 4)
    assert np.array_equal(kept, latents)
    assert frames == 9
    Path("v.2.latents.safetensors").unlink()
    Path("file").touch()
    arguments.save_latents = "file/mine.safetensors"
    with pytest.raises(MediaError, match=r"^file/mine.*--latents=v\.2\.latents\.safetensors"):
        _write_clip(output, arguments, request)
    assert np.array_equal(read_latents("v.2.latents.safetensors", 4)[0], latents)
    Path("v.2.latents.safetensors").unlink()
    arguments.save_latents = "mine.safetensors"
    _write_clip(output, arguments, request)
    written = ["file", "mine.safetensors", "v.latents.safetensors", "v.mp4", "v.png"]
    assert sorted(path.name for path in Path().iterdir()) == written


def test_latents_survive_an_interruption_and_no_room_beside_the_video(capsys, monkeypatch, tmp_path):
    latents = jnp.zeros((1, 3, 8, 8, 4))
    with pytest.raises(KeyboardInterrupt), keep_latents(Path("v.mp4"), latents, 9):
        raise KeyboardInterrupt
    assert "--latents=v.latents.safetensors" in capsys.readouterr().err
    Path("file").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    expected = f"--latents={tmp_path}/w.latents.safetensors"
    with pytest.raises(MediaError, match=expected), keep_latents(Path("file/w.mp4"), latents, 9):
        raise MediaError("file/w.mp4: cannot be written")
    with full_disk(0), pytest.raises(MediaError, match=r"written$"), keep_latents(Path("x.mp4"), latents, 9):
        raise MediaError("x.mp4: cannot be written")
    saved = {"saved": "mine.safetensors"}
    with pytest.raises(MediaError, match="mine"), keep_latents(Path("y.mp4"), latents, 9, **saved):
        raise MediaError("y.mp4: cannot be written")


@pytest.mark.parametrize(
    ("tensors", "frames", "named"),
    [
        ({"latents": np.zeros((1, 5, 3, 8, 8), np.float32)}, None, "4 x any"),
        ({"latents": np.zeros((1, 4, 0, 8, 8), np.float32)}, None, "4 x any"),
        ({"latents": np.zeros((4, 3, 8, 8), np.float32)}, None, "4 x any"),
        ({"latents": np.full((1, 4, 3, 8, 8), np.inf, np.float32)}, None, "finite"),
        ({"latents": np.zeros((1, 4, 3, 8, 8), np.float32)}, "10", "10 frames"),
        ({"latents": np.zeros((1, 4, 3, 8, 8), np.float32)}, "-1", "frames"),
        ({"noise": np.zeros((1, 4, 3, 8, 8), np.float32)}, None, "holds noise"),
    ],
)
def test_latents_that_do_not_fit_are_refused(tensors, frames, named):
    save_file(tensors, "a.safetensors", frames and {"num_frames": frames})
    with pytest.raises(WeightsError, match=named):
        read_latents("a.safetensors", 4)


def test_saved_latents_are_decoded_by_a_command(capsys):
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 4, 4, 32)), jnp.float32)
    save_latents("a.safetensors", latents)
    assert load_file("a.safetensors")["latents"].shape == (1, 32, 1, 4, 4)
    media.write_audio("a.wav", np.full(640, 9000, np.int16), 16_000)
    assert not main([TINY, "--latents=a.safetensors", "--audio=a.wav", "--output=out/a.mp4"])
    printed = capsys.readouterr().out
    assert "vae ................ miniature_vae, bfloat16, trained here, " in printed
    assert media.read_video("out/a.mp4")[0].shape == (1, 32, 32, 3)
    assert media.probe_video("out/a.mp4").has_audio
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.mp4", "a.png"]


def test_a_store_needs_a_name_in_utf8(capsys, tmp_path):
    folder = Path(os.fsdecode(b"\xff"))
    folder.mkdir()
    (folder / "vae").symlink_to(Path(fantasy_jax.__file__).parent / "assets/tiny/vae")
    for command in (
        ["export", f"--weights={folder}", "--component=vae", "--output=x.safetensors"],
        ["import", f"--output={folder}", f"--wav2vec2={DATA / 'wav2vec2'}"],
    ):
        code, _, error = run_convert_weights(capsys, *command)
        assert (code, error.splitlines()[-1].count("UTF-8")) == (2, 1)
    assert [path.name for path in folder.iterdir()] == ["vae"]


def test_a_folder_of_other_files_is_no_store(capsys):
    Path("model/speech_encoder").mkdir(parents=True)
    Path("model/speech_encoder/model.safetensors").write_text("mine")
    code, _, error = run_convert_weights(
        capsys, "import", "--output=model", f"--wav2vec2={DATA / 'wav2vec2'}"
    )
    assert code == 2
    assert "holds model.safetensors" in error
    assert [path.name for path in Path("model").rglob("*.*")] == ["model.safetensors"]


def test_an_error_of_memory_is_one_line(capsys):
    for error in (MemoryError("too much"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")):

        def fail(error=error):
            raise error

        with pytest.raises(SystemExit) as stopped:
            cli.run(fail, "sample.py")
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_warnings_are_lines_like_other_messages(capsys):
    def warn():
        logging.getLogger("fantasy_jax.media").warning("a%s", "\nb\x1b[2J")

    with pytest.raises(SystemExit):
        cli.run(warn, "sample.py")
    assert capsys.readouterr().err == "warning: a b\\x1b[2J\n"
