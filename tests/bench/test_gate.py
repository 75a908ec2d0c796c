import math

import pytest
import torch

from leannorm.bench import gate

EXACT = {"y": torch.linspace(-1, 1, 1000, dtype=torch.float64)}


def moved(amount: float) -> dict[str, torch.Tensor]:
    """Make a tensor with this relative error."""
    return {"y": EXACT["y"] * (1 + amount)}


def judge(found, torchs, dtype=torch.float32):
    (check,) = gate.check("ours", found, EXACT, torchs, EXACT, dtype)
    return check, gate.failures("a case", [check])


@pytest.mark.parametrize(("error", "red"), [(1.9e-4, False), (2.1e-4, True), (math.nan, True), (math.inf, True)])
def test_twice_torchs_error_is_the_limit(error, red):
    check, failures = judge([moved(error)], [moved(1e-4)])
    assert check.torch_error == pytest.approx(1e-4)
    assert check.limit == pytest.approx(2e-4, rel=1e-2)
    assert bool(failures) == red
    if red:
        assert failures[0].startswith("a case: ours: y has the relative error ")


def test_one_rounding_of_one_element_is_allowed_where_torch_is_exact():
    rounding = torch.finfo(torch.float32).eps
    close, wrong = EXACT["y"].clone(), EXACT["y"].clone()
    close[-1] += 0.9 * rounding
    wrong[-1] += 1.1 * rounding
    assert judge([{"y": close}], [EXACT])[1] == []
    assert judge([{"y": wrong}], [EXACT])[1] != []


def test_what_is_wrong_in_every_trial_is_red_and_once_is_not():
    assert judge([moved(1e-1), moved(1e-5)], [moved(1e-5), moved(1e-5)])[1] == []
    assert judge([moved(1e-1), moved(1e-4)], [moved(1e-5), moved(1e-5)])[1] != []
    assert judge([moved(1e-4), moved(math.nan)], [moved(1e-3), moved(1e-3)])[1] != [], "a NaN is never forgiven"


def test_the_verdict_lists_the_failures():
    assert str(gate.RedGate(["one", "two"])).splitlines()[1:] == ["one", "two"]
