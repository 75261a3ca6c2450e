"""How the processes of a run end together, by a coordination service that is a dictionary."""

import threading
import time

import numpy as np
import pytest

from fantasy_jax.errors import ConfigError
from fantasy_jax.training import loop, peers
from fantasy_jax.training.peers import Peers


class Service(dict):
    """The part of a client that is used."""

    def key_value_set(self, key, value):
        self[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.items() if key.startswith(f"{folder}/")]


class Ended(BaseException):
    """A process ends, rather than the tests."""


@pytest.fixture(autouse=True)
def ends(monkeypatch):
    """The messages of processes that end, of the first of two processes."""
    messages = []

    def end(self, message):
        messages.append(message)
        if threading.current_thread() is threading.main_thread():
            raise Ended

    monkeypatch.setattr(Peers, "_end", end)
    monkeypatch.setattr(peers, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(peers, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(peers.jax, "process_count", lambda: 2)
    monkeypatch.setattr(peers.jax, "process_index", lambda: 0)
    return messages


def fail(joined):
    with joined.told():
        raise OSError("mine")


def wait_for(messages):
    deadline = time.monotonic() + 5
    while not messages and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_process_that_ends_because_of_another_one_does_not_fail_meanwhile(ends):
    service = Service()
    joined = Peers(service)
    service[f"{joined._folder}/1"] = "disk full"
    wait_for(ends)
    waiting = [threading.Thread(target=do, daemon=True) for do in (lambda: fail(joined), joined.leave)]
    for thread in waiting:
        thread.start()
        thread.join(0.1)
    assert ends == ["process 1 failed: disk full"]
    assert service[f"{joined._folder}/0"] == peers._FOLLOWED
    assert all(thread.is_alive() for thread in waiting)


@pytest.mark.parametrize(("other", "raised"), [("disk full", OSError), (peers._FOLLOWED, Ended)])
def test_an_error_is_raised_where_all_fail_by_themselves(ends, other, raised):
    service = Service()
    joined = Peers(service)
    service[f"{joined._folder}/1"] = other
    with pytest.raises(raised):
        fail(joined)
    joined.leave()
    assert ends == (["mine"] if raised is Ended else [])


@pytest.mark.parametrize("method", ["key_value_set", "key_value_dir_get"])
def test_without_the_service_a_process_ends_with_its_own_message(ends, monkeypatch, method):
    def gone(*_):
        raise RuntimeError("UNAVAILABLE: the service is gone\nin many lines")

    joined = Peers(Service())
    monkeypatch.setattr(joined._client, method, gone)
    with pytest.raises(Ended):
        fail(joined)
    assert ends == ["mine"]


def test_a_failure_ends_no_later_run_of_the_process(ends):
    service = Service()
    first = Peers(service)
    first.leave()
    service[f"{first._folder}/1"] = "disk full"
    second = Peers(service)
    time.sleep(0.3)
    assert not ends
    second.leave()


@pytest.mark.parametrize(("index", "raised"), [(0, OSError), (1, ConfigError)])
def test_a_folder_that_the_first_process_cannot_use_ends_all(monkeypatch, tmp_path, index, raised):
    (tmp_path / "file").touch()
    told = []

    def broadcast(refused):
        told.append(bool(refused))
        return np.array(True)

    monkeypatch.setattr(peers.jax, "process_index", lambda: index)
    monkeypatch.setattr(loop.multihost_utils, "broadcast_one_to_all", broadcast)
    with pytest.raises(raised), loop.lock_workdir(tmp_path / "file/workdir"):
        pass
    assert told == [index == 0]
