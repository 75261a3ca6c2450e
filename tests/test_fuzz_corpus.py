"""What `fuzz.py` has found is read, or refused in one line."""

import pytest
from fuzz import CORPUS, TARGETS, fault_of
from fuzz_inputs import MAKERS

from fantasy_jax.errors import MediaError


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_what_was_found_is_read_or_refused_in_one_line(path):
    assert not fault_of(path)


@pytest.mark.parametrize("message", ["", "two: error: lines", "an escape\x1b[2J"])
def test_other_endings_are_found(tmp_path, monkeypatch, message):
    def read(path):
        raise KeyError(message)

    monkeypatch.setitem(TARGETS, "batch", (read,))
    assert "KeyError" in fault_of(tmp_path / "batch-x.csv")


@pytest.mark.parametrize("target", TARGETS)
def test_valid_files_are_accepted(tmp_path, target):
    (tmp_path / target).mkdir()
    for suffix, content in MAKERS[target][0](tmp_path / target):
        path = tmp_path / f"{target}-valid{suffix}"
        path.write_bytes(content)
        assert not fault_of(path, valid=True), suffix


def test_a_reader_that_refuses_everything_is_found(tmp_path, monkeypatch):
    def read(path):
        raise MediaError("no batch")

    monkeypatch.setitem(TARGETS, "batch", (read,))
    assert not fault_of(tmp_path / "batch-x.csv")
    assert "no batch" in fault_of(tmp_path / "batch-x.csv", valid=True)
