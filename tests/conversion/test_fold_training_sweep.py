"""fuse(convolution=True) over torchvision's classification models and a hundred of timm's; prints the share folded.

Each model trains one step with the convolution folded and without, in float64 so that only rounding can differ.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from test_fold_training import operators
from test_fusion_sweep import LARGE, SIZES, TIMM, assert_close, batch_norms, models, training_step

import leannorm
from leannorm import GridSampling

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]


def check(make, size: int) -> Counter:
    """Fold a model and compare; count its BN layers, those that are folded, and the reasons of the others."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = make()
    if not batch_norms(model) or sum(p.numel() for p in model.parameters()) > LARGE:
        return Counter()
    leannorm.convert(model.double(), GridSampling(1 / 4, minimum=16))  # fewer amplify rounding beyond comparison
    keys = list(model.state_dict())
    x = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leannorm.fuse(model)
    expected = training_step(model, x)
    _, report = leannorm.fuse(model, convolution=True)
    assert list(model.state_dict()) == keys
    assert_close(training_step(model, x), expected)
    folded = [change for change in report.changes if change.action.startswith("convolution + ")]
    assert bool(operators(model, x)[0]) == bool(folded)
    reasons = Counter(refusal.reason for refusal in report.refusals)
    return Counter(folded=len(folded), total=batch_norms(model)) + reasons


@pytest.fixture(scope="module")
def shares(request):
    """Collect what is folded, and print it at the end."""
    found: dict[str, Counter] = {}
    yield found
    terminal = request.config.pluginmanager.getplugin("terminalreporter")
    terminal.write_line("\nBN layers whose convolution is computed with them")
    for family, counts in sorted(found.items()):
        folded, total = counts.pop("folded", 0), counts.pop("total", 0)
        terminal.write_line(f"  {family}: {folded} of {total}")
        for reason, count in counts.items():
            terminal.write_line(f"      {count}: {reason}")


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_torchvision(name, shares):
    options = {"aux_logits": True, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    family = models.get_model_builder(name).__module__.rpartition(".")[2]
    found = check(lambda: models.get_model(name, weights=None, **options), SIZES.get(name, 64))
    shares.setdefault(f"torchvision {family}", Counter()).update(found)


@pytest.mark.parametrize(("name", "size"), [(name, size) for size, names in TIMM.items() for name in names.split()])
def test_timm(name, size, shares):
    timm = pytest.importorskip("timm")
    family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    shares.setdefault(f"timm {family}", Counter()).update(check(lambda: timm.create_model(name), size))
