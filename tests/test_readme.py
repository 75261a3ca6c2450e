"""Commands, settings, paths and imports in README.md and docs/ exist; examples that can run, run."""

import argparse
import ast
import configparser
import contextlib
import importlib
import io
import re
import runpy
import shlex
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from fantasy_jax.config import load_config, override
from fantasy_jax.errors import ConfigError

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
INSTALLED_PROGRAMS = Path(sys.executable).parent
PAGES = (README, *sorted(ROOT.glob("docs/*.md")))
CONFIGS = ("configs/tiny.py", "configs/fantasy_talking_14b.py:adapters", "configs/fantasy_portrait_14b.py")
PROGRAMS = (
    *("sample.py", "train.py", "fantasy_jax.prepare", "fantasy_jax.benchmark"),
    "fantasy_jax.miniature.lip_sync",
    *(f"convert_weights.py {command}" for command in ("import", "export", "inspect", "quantize", "verify")),
)
FILES = re.compile(r"(?:^|(?<=[\s`(\"'=]))((fantasy_jax|configs|docs|tests|\.ci)/[\w./-]+)", re.MULTILINE)
SETTING = re.compile(r"(data|model|prepare|sample|train|video)(\.[a-z0-9]\w*)+(?<!\.py)(?<!\.json)(?<!\.png)")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pages
def test_commands(page):
    for command in commands(page):
        if command[:1] == ["make"]:
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert [x for x in command[1:] if "=" not in x and x not in targets] == [], command
        for words in python_calls(command):
            check_call(words, command)


@pages
def test_commands_are_parsed_as_they_are_written(page):
    """Python is that of `make install`, and every program takes the arguments of its command."""
    for command in (words for body in blocks(page, "") for words in lines_of(body)):
        assert not any((INSTALLED_PROGRAMS / word).exists() for word in command if "/" not in word), command
        for words in python_calls(command):
            if "..." not in words and words[0] != "-c" and not words[0].startswith("tests/"):
                assert_parsed(words)


@pages
def test_extras(page):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = re.findall(r"(?:\.\[|EXTRAS=)([\w,]+)", page.read_text())
    assert {x for group in named for x in group.split(",")} <= set(setup["options.extras_require"])


@pages
def test_settings(page):
    for setting in settings_in_text(page):
        assert any(exists(config, setting) for config in CONFIGS), setting


@pages
def test_options(page):
    for option in re.findall(r"`(--(?!config\.)[\w]+)[^`\n]*`", page.read_text()):
        assert any(has_option(help_of(*program.split()), option) for program in PROGRAMS), option


@pages
def test_paths(page):
    text = page.read_text()
    links = [x for x in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in x]
    files = [x[0] for x in FILES.findall(text)]
    missing = [x for x in links if not (page.parent / x).exists()]
    # Places that the guide to adapters names are no files.
    missing += [x for x in files if "NAME" not in x and not (ROOT / x.rstrip("./")).exists()]
    assert missing == []


@pages
def test_imports(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("fantasy_jax"):
                module = importlib.import_module(node.module)
                assert [x.name for x in node.names if not hasattr(module, x.name)] == []


@pytest.mark.slow
def test_example_of_a_reference_verifies(tmp_path):
    example = next(block for block in blocks(README, "python") if "my_wav2vec2" in block)
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True, capture_output=True)
    convert_weights = importlib.import_module("convert_weights")
    assert convert_weights.main(["verify", "--reference", str(tmp_path / "my_wav2vec2")]) == 0


def blocks(page, language):
    """Fenced code blocks of a language; '' for commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [body for name, body in found if name == language]


def commands(page):
    """Words of every command in code blocks and, where they are whole commands, in code spans."""
    written = [words for body in blocks(page, "") for words in lines_of(body)]
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = [x.replace("\n", " ") for x in re.findall(r"`([^`]+)`", text)]
    calls = r"((make|(\.venv/bin/)?python|pip) |(train|sample|convert_weights)\.py --)"
    return written + [shlex.split(x, comments=True) for x in spans if re.match(calls, x)]


def lines_of(body):
    """Words of every command in a code block."""
    lines = body.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def python_calls(words):
    """The calls of Python in a command, also of one that another command is given to run."""
    calls = [call for word in words if "python " in word for call in python_calls(shlex.split(word))]
    if python := next((word for word in words if word.rpartition("/")[2] == "python"), None):
        calls.append([word for word in words[words.index(python) + 1 :] if word != "&"])
    elif words[0].endswith(".py"):
        calls.append(words)
    return calls


def check_call(words, command):
    """Asserts that the program, its options and its settings exist."""
    program, rest = program_of(words)
    if program == "-c":
        compile(rest[0], shlex.join(command), "exec")
        return
    if not program.startswith(("fantasy_jax", "train", "sample", "convert_weights")):
        assert words[0] == "-m" or (ROOT / program).is_file(), command
        return
    sub = [rest[0]] if program == "convert_weights.py" and rest and not rest[0].startswith("-") else []
    shown = help_of(program, *sub)
    config = next((x.removeprefix("--config=") for x in rest if x.startswith("--config=")), None)
    settings = [x.removeprefix("--config.") for x in rest if x.startswith("--config.")]
    if config != "FILE":
        override(read(config or CONFIGS[1]).copy_and_resolve_references(), settings)
    for word in rest:
        if word.startswith("--") and not word.startswith("--config."):
            assert has_option(shown, word), f"{word} in {shlex.join(command)}"


def program_of(words):
    """The script or module of a call, and its arguments."""
    return (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])


class Parsed(BaseException):
    """Raised in place of the work, once the arguments are accepted."""


def assert_parsed(words):
    """Asserts that a program accepts its arguments, without running it."""
    program, arguments = program_of(words)
    parse = argparse.ArgumentParser.parse_args

    def only_parse(*given):
        parse(*given)
        raise Parsed

    with (
        mock.patch.object(sys, "argv", [program, *arguments]),
        mock.patch.object(argparse.ArgumentParser, "parse_args", only_parse),
        pytest.raises(Parsed),
    ):
        run_script(program)


def run_script(program):
    """Runs a program in this process, which it must not make end on Ctrl-C."""
    with mock.patch.object(signal, "signal"):
        runpy.run_path(script_of(program), run_name="__main__")


def script_of(program):
    """The file of a script or module."""
    path = ROOT / program
    if path.suffix != ".py":
        path = ROOT / program.replace(".", "/")
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return str(path)


def has_option(shown, word):
    return re.search(rf"{re.escape(word.partition('=')[0])}\b", shown)


@cache
def help_of(program, *arguments):
    """The help of a script or module, run in this process."""
    output = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [program, *arguments, "--help"]),
        contextlib.redirect_stdout(output),
        pytest.raises(SystemExit) as stopped,
    ):
        run_script(program)
    assert stopped.value.code == 0
    return output.getvalue()


def settings_in_text(page):
    """Settings in code spans: `--config.NAME=VALUE`, or a path that starts with a section of a config."""
    spans = re.findall(r"`([^`\n]+)`", page.read_text())
    given = [x.strip('"').removeprefix("--config.") for x in spans if re.match(r'"?--config\.', x)]
    named = [x for x in spans if SETTING.fullmatch(x)]
    return [x.partition("=")[0] for x in given + named if "NAME" not in x]


def exists(config, setting):
    """Whether a config has a setting, or a section of this name."""
    try:
        override(read(config).copy_and_resolve_references(), [f"{setting}=None"])
    except ConfigError as error:
        return "section" in str(error)
    return True


@cache
def read(config):
    return load_config(str(ROOT / config))
