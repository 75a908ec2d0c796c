"""The latency of ResNet-18's forms: wrong outputs are not timed, the committed records are what the README shows."""

from pathlib import Path

import latency
import pytest
import torch

from leannorm import records

ROOT = Path(__file__).parents[2]


def test_a_form_with_wrong_outputs_is_not_timed(monkeypatch):
    monkeypatch.setattr(latency, "forms", lambda model, x, folder: {"torch eager": lambda: 1.001 * model(x)})
    monkeypatch.setattr(latency.timing, "interleave", lambda *args, **kwargs: pytest.fail("it was timed"))
    with pytest.raises(ValueError, match=r"nothing was timed: \[Form\(name='torch eager', error=0\.00"):
        latency.measure()


def test_every_form_is_that_model(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    model = latency.build("torchvision:mobilenet_v3_small", classes=10, channels=3).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        expected = model(x)
        for name, step in latency.forms(model, x, tmp_path).items():
            torch.testing.assert_close(torch.as_tensor(step()), expected, msg=name)


def test_the_committed_record_has_every_form_in_the_readme():
    found = records.read(latency.Latency, ROOT / latency.LATENCY)
    assert found.forms[0].name == "torch eager"
    assert [form.name for form in found.forms] == [timed.side for timed in found.timings]
    assert all(form.error < latency.MAX_ERROR for form in found.forms)
    assert latency.table(found) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_committed_fold_times_are_raw():
    found = records.read(latency.FoldTime, ROOT / latency.FOLDING)
    assert len(found.fold_seconds) == len(found.export_seconds) == latency.FOLDS
