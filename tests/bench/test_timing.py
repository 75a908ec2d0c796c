"""How samples are taken, with a clock of the test's own."""

import gc

import pytest

from leannorm.bench import timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the steps move."""

    class Clock:
        now = 0
        calls: list[str]

        def step(self, name, nanoseconds):
            def run():
                self.calls.append(name)
                self.now += nanoseconds

            return run

    clock = Clock()
    clock.calls = []
    monkeypatch.setattr("time.perf_counter_ns", lambda: clock.now)
    return clock


def test_a_sample_lasts_long_enough_and_tells_seconds_an_iteration(clock):
    steps = {"short": clock.step("short", 100_000), "long": clock.step("long", 20_000_000)}
    short, long = timing.interleave(steps, repeats=5)
    assert (short.side, long.side) == ("short", "long")
    assert short.iterations * 100e-6 >= timing.SHORTEST_SAMPLE
    assert short.iterations <= 100
    assert long.iterations == 1
    assert short.seconds == pytest.approx([100e-6] * 5)
    assert long.seconds == pytest.approx([20e-3] * 5)


def test_every_round_has_every_side_once_in_an_order_of_its_own(clock):
    steps = {name: clock.step(name, 10_000_000) for name in "abcd"}
    timing.interleave(steps, repeats=20, seed=1)
    rounds = ["".join(clock.calls[-80:][i : i + 4]) for i in range(0, 80, 4)]
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 5


def test_a_side_may_rest_before_each_sample_and_warms_up_untimed(clock, monkeypatch):
    rested = []
    monkeypatch.setattr("time.sleep", rested.append)
    (sampled,) = timing.interleave({"a": clock.step("a", 10_000_000)}, repeats=3, rest=0.25)
    assert rested == [0.25] * 3
    assert clock.calls[-6:] == ["a"] * 6
    assert sampled.seconds == pytest.approx([10e-3] * 3)


def test_untimed_iterations_of_a_side_come_before_each_sample(clock):
    a, b = timing.interleave({"a": clock.step("a", 10_000_000), "b": clock.step("b", 20_000_000)}, repeats=2, untimed=2)
    assert [clock.calls[-12:][i : i + 3] in (["a"] * 3, ["b"] * 3) for i in range(0, 12, 3)] == [True] * 4
    assert a.seconds == pytest.approx([10e-3] * 2)
    assert b.seconds == pytest.approx([20e-3] * 2)


def test_no_garbage_is_collected_within_samples(clock):
    enabled = []
    (sampled,) = timing.interleave({"a": lambda: enabled.append(gc.isenabled())}, repeats=3, shortest_sample=0.0)
    assert len(sampled.seconds) == 3
    assert enabled[-3:] == [False] * 3
    assert gc.isenabled()
