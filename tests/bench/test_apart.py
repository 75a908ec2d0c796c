import os
import signal
from functools import partial
from multiprocessing import active_children

import pytest
import torch

from leannorm.bench.apart import apart, isolated


def make(path, word):
    def step():
        with path.open("a") as file:
            file.write(f"{word} {os.getpid()}\n")

    return (os.getpid(), torch.get_num_threads()), step


def leave():
    os._exit(3)


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def fail_at_the_first_step():
    def step():
        raise ValueError("no step")

    return "made", step


def test_each_step_is_taken_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "steps"
    with apart({word: partial(make, path, word) for word in ("one", "two")}) as made:
        (one, threads), step = made["one"]
        (two, _), other = made["two"]
        assert len({one, two, os.getpid()}) == 3
        assert threads == torch.get_num_threads()
        for each in (step, other, step):
            each()
        os.kill(one, signal.SIGINT)  # as a terminal sends it to all of them
        step()
        assert path.read_text().splitlines() == [f"one {one}", f"two {two}", f"one {one}", f"one {one}"]
    assert active_children() == []


def test_a_process_that_ends_is_told(capfd):
    with pytest.raises(RuntimeError, match="the process of one was ended with code 3"), apart({"one": leave}):
        pytest.fail("made")
    with pytest.raises(RuntimeError, match="for want of memory"), apart({"one": be_killed}):
        pytest.fail("made")
    with (
        apart({"one": fail_at_the_first_step}) as made,
        pytest.raises(RuntimeError, match="code 1 by itself"),
    ):
        made["one"][1]()
    assert "ValueError: no step" in capfd.readouterr().err
    assert active_children() == []


def test_a_call_in_a_process_of_its_own():
    assert isolated(os.getpid) != os.getpid()
    assert isolated(torch.get_num_threads) == torch.get_num_threads()
