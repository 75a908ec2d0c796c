"""The L1 penalty on gamma: its subgradient, its record, its resumption, and what comes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import leannorm
from leannorm import records
from leannorm.records import TrainingRun
from leannorm.train import checkpoint
from leannorm.train.module import ImageClassifier, penalized
from leannorm.train.run import train

ARGUMENTS = {"statistics": "grid:1/4", "seed": 3, "batch_size": 256, "learning_rate": 0.05}


def gammas(folder):
    model, _ = checkpoint.load(folder / "last.ckpt")
    return torch.cat([module.weight.detach() for module in model.modules() if isinstance(module, _BatchNorm)])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_step_has_the_subgradient_once_and_of_gammas_alone(tmp_path, monkeypatch, accumulate):
    step, seen = ImageClassifier.on_before_optimizer_step, []

    def observe(self, optimizer):
        before = {name: parameter.grad.clone() for name, parameter in self.model.named_parameters()}
        step(self, optimizer)
        layers = {f"{name}.weight" for name, module in self.model.named_modules() if isinstance(module, _BatchNorm)}
        for name, parameter in self.model.named_parameters():
            added = 0.25 * parameter.detach().sign() if name in layers else torch.zeros_like(parameter)
            assert torch.equal(parameter.grad, before[name] + added)
        seen.append(len(layers))

    monkeypatch.setattr(ImageClassifier, "on_before_optimizer_step", observe)
    train("resnet8", "digits", epochs=3, out=tmp_path, gamma_l1=0.25, accumulate=accumulate, **ARGUMENTS)
    assert seen == [9] * 3 * (5 // accumulate)


def test_the_penalty_is_recorded_and_makes_gammas_small(tmp_path):
    free, penalty = tmp_path / "free", tmp_path / "penalty"
    train("resnet8", "digits", epochs=2, out=free, **ARGUMENTS)
    run = train("resnet8", "digits", epochs=2, out=penalty, gamma_l1=0.2, **ARGUMENTS)
    assert run.gamma_l1 == 0.2
    assert records.read(TrainingRun, penalty / "run.json") == run
    assert records.read(TrainingRun, free / "run.json").gamma_l1 == 0.0
    assert gammas(penalty).abs().sum() < 0.9 * gammas(free).abs().sum()


def test_a_resumed_run_ends_as_if_it_had_never_been_stopped(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train("resnet8", "digits", epochs=2, out=whole, gamma_l1=0.05, **ARGUMENTS)
    training_step = ImageClassifier.training_step

    def stop(self, batch, batch_idx):
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train("resnet8", "digits", epochs=2, out=broken, gamma_l1=0.05, **ARGUMENTS)
    monkeypatch.undo()
    train("resnet8", "digits", epochs=2, out=broken, gamma_l1=0.05, resume=True, **ARGUMENTS)
    assert torch.equal(gammas(broken), gammas(whole))


def test_a_gamma_counts_once_and_others_do_not():
    norm, frozen = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    frozen.weight.requires_grad_(requires_grad=False)
    tied = nn.BatchNorm1d(2)
    tied.weight = norm.weight
    model = nn.Sequential(norm, tied, frozen, nn.BatchNorm1d(2, affine=False), nn.LayerNorm(2), nn.GroupNorm(1, 2))
    (gamma,) = penalized(model)
    assert gamma is norm.weight


def test_a_penalized_model_is_pruned(tmp_path):
    train("resnet8", "digits", epochs=2, out=tmp_path, gamma_l1=0.05, **ARGUMENTS)
    model, _ = checkpoint.load(tmp_path / "last.ckpt")
    pruned, report = leannorm.prune(model, torch.randn(2, 1, 8, 8), ratio=0.3)
    assert report.channels_after < report.channels_before
    assert pruned(torch.randn(2, 1, 8, 8)).shape == (2, 10)
