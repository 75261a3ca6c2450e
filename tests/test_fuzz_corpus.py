"""What `fuzz.py` has found is read, or refused in one line."""

import pytest
from fuzz import CORPUS, TARGETS, fault_of


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_what_was_found_is_read_or_refused_in_one_line(path):
    assert not fault_of(path)


@pytest.mark.parametrize("message", ["", "two: error: lines", "an escape\x1b[2J"])
def test_other_endings_are_found(tmp_path, monkeypatch, message):
    def read(path):
        raise KeyError(message)

    monkeypatch.setitem(TARGETS, "batch", (read,))
    assert "KeyError" in fault_of(tmp_path / "batch-x.csv")
