"""A fused model's life: conversion, copies, freezing, changes afterwards, compiling, and back."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_fusion import _statement, assert_same_training, block, operator_calls, residual_network, train_step
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

import leannorm
from leannorm import Activation, parse_statistics
from leannorm.nn.fused import Fused


@pytest.mark.parametrize("spelling", ["full", "grid:1/4@minimum=4", "fs:1/4@minimum=4"])
def test_convert_and_fuse_in_either_order(spelling):
    source = parse_statistics(spelling)
    one, other = residual_network(), residual_network()
    leannorm.fuse(leannorm.convert(one, source)[0])
    leannorm.convert(leannorm.fuse(other)[0], source)
    reference, _ = leannorm.convert(residual_network(), source)
    x = torch.randn(4, 4, 16, 16, dtype=torch.float64)
    assert len(operator_calls(one, x.float())) == 9
    assert_same_training(other, reference, x)
    reference, _ = leannorm.convert(residual_network(), source)
    assert_same_training(one, reference, x)


def test_virtual_samples():
    model, reference = residual_network(), residual_network()
    for network in (model, reference):
        leannorm.convert(network, parse_statistics("fs:1/4@minimum=4+vdn:1"))
    leannorm.fuse(model)
    assert_same_training(model, reference, torch.randn(4, 4, 16, 16, dtype=torch.float64))
    leannorm.revert(model)
    assert not model._forward_hooks


@pytest.mark.parametrize("sampled", [False, True])
def test_revert_restores_classes_attributes_and_outputs_bit_for_bit(sampled):
    model = residual_network()
    reference = copy.deepcopy(model)
    leannorm.fuse(model, torch.randn(2, 4, 16, 16))
    if sampled:
        leannorm.convert(model, leannorm.GridSampling(1 / 4))
    _, report = leannorm.revert(model)
    assert {"1", "1.bn1"} <= {change.module for change in report.changes}
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in reference.named_modules()}
    assert {n: set(vars(m)) for n, m in model.named_modules()} == {
        n: set(vars(m)) for n, m in reference.named_modules()
    }
    x = torch.randn(4, 4, 16, 16)
    torch.testing.assert_close(train_step(model, x), train_step(reference, x), rtol=0, atol=0)


def test_copies_and_pickles():
    model, _ = leannorm.fuse(leannorm.convert(residual_network(), leannorm.GridSampling(1 / 4))[0])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[1]) is type(model[1])
        assert twin[1].bn1.weight is not model[1].bn1.weight
        assert len(operator_calls(twin, torch.randn(4, 4, 16, 16))) == 9
        leannorm.revert(twin)
        assert type(twin[1]) is BasicBlock
        assert type(twin[0]) is nn.Sequential


def test_a_pickle_with_constants_and_user_functions():
    model = block(_statement)
    leannorm.fuse(model)
    twin = copy.copy(model)
    assert type(twin) is type(model)
    assert model._fused_rewrite.constants == (Activation("relu"),)
    _, blank_arguments, state = model.__reduce_ex__(4)
    assert pickle.loads(pickle.dumps(blank_arguments[1])) == model._fused_rewrite
    assert state.keys() == vars(model).keys()


def test_fusing_again_is_the_same():
    model = residual_network()
    _, first = leannorm.fuse(model)
    classes = [type(module) for module in model.modules()]
    _, second = leannorm.fuse(model)
    assert first == second
    assert classes == [type(module) for module in model.modules()]


def test_freeze_and_unfreeze_a_fused_model():
    model, reference = residual_network(), residual_network()
    leannorm.fuse(model)
    for network in (model, reference):
        leannorm.freeze(network)
        network.train()
    assert_same_training(model, reference, torch.randn(4, 4, 16, 16, dtype=torch.float64))
    for network in (model, reference):
        leannorm.unfreeze(network)
    assert_same_training(model, reference, torch.randn(4, 4, 16, 16, dtype=torch.float64))
    leannorm.revert(model)
    plain, _ = leannorm.freeze(reference)
    leannorm.fuse(plain)  # unfreeze then makes torch's layers of these
    leannorm.unfreeze(plain)
    assert type(plain[1].bn1) is nn.BatchNorm2d
    assert_same_training(plain, model, torch.randn(4, 4, 16, 16, dtype=torch.float64))


def test_recalibrate_a_fused_model():
    model, reference = residual_network(), residual_network()
    leannorm.fuse(model)
    batches = [torch.randn(4, 4, 16, 16) for _ in range(3)]
    for network in (model, reference):
        leannorm.recalibrate(network, batches)
    torch.testing.assert_close(model.state_dict(), reference.state_dict())


def test_a_path_around_the_fused_call_computes_as_before():
    model, reference = residual_network(), residual_network()
    leannorm.fuse(model)
    x = torch.randn(2, 4, 16, 16)
    for network in (model, reference):
        network.results = [network[0][:2](x), network[0][1](network[0][0](x))]
        y = x
        for layer in network[0]:
            y = layer(y)
        network.results += [y, network[1].bn1(network[1].conv1(y))]
    torch.testing.assert_close(model.results, reference.results)


def test_children_that_are_changed_afterwards():
    model, reference = residual_network(), residual_network()
    leannorm.fuse(model)
    for network in (model, reference):
        network[0][2] = nn.Tanh()
        network[0].append(nn.Hardswish())
        network[1]._modules["bn1"] = nn.GroupNorm(2, 8)
        network[1]._modules["relu"] = nn.Tanh()
        network[3]._modules["relu"].register_forward_hook(lambda m, i, y: y * 2)
    assert isinstance(model[1], Fused)
    assert_same_training(model, reference, torch.randn(4, 4, 16, 16, dtype=torch.float64))
    with pytest.warns(UserWarning, match=r"FusedBottleneck.relu is set after leannorm.fuse"):
        model[3].relu = nn.Softplus()
    reference[3].relu = nn.Softplus()
    assert type(model[3]) is Bottleneck
    model[1].add_module("other", nn.ReLU())
    reference[1].add_module("other", nn.ReLU())
    assert_same_training(model, reference, torch.randn(4, 4, 16, 16, dtype=torch.float64))


def test_torchs_synchronizing_converter_leaves_what_a_fused_model_computes():
    model, reference = residual_network(), residual_network()
    leannorm.fuse(model)
    model, reference = map(nn.SyncBatchNorm.convert_sync_batchnorm, (model, reference))
    assert isinstance(model[1].bn1, nn.SyncBatchNorm)
    for network in (model, reference):
        for module in network.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.forward = lambda x, m=module: F.batch_norm(x, None, None, m.weight, m.bias, True)
    assert_same_training(model, reference, torch.randn(4, 4, 16, 16, dtype=torch.float64))


def test_hooks_of_blocks_go_on():
    model = residual_network()
    seen = []
    model[1].register_forward_hook(lambda m, i, y: seen.append(y))
    model[1].register_full_backward_hook(lambda m, i, o: seen.append(o))
    leannorm.fuse(model)
    assert isinstance(model[1], Fused)
    model[2].register_full_backward_hook(lambda m, i, o: seen.append(o))
    assert isinstance(model[2], Fused)
    model(torch.randn(2, 4, 16, 16)).sum().backward()
    assert len(seen) == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint(reentrant):
    model, reference = residual_network(), residual_network()
    leannorm.fuse(model)
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    for network in (model, reference):
        network.double()
    wrapped = copy.deepcopy(model)
    wrapped.forward = lambda x: checkpoint(lambda x: type(wrapped).forward(wrapped, x), x, use_reentrant=reentrant)
    torch.testing.assert_close(train_step(wrapped, x), train_step(reference, x))


def test_compiled_without_graph_breaks():
    torch._dynamo.reset()
    model, reference = residual_network(), residual_network()
    leannorm.fuse(model)
    compiled = torch.compile(model.double(), fullgraph=True, backend="aot_eager")
    reference.double()
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    expected = train_step(reference, x, leaf=True)
    found = train_step(compiled, x, leaf=True)
    torch.testing.assert_close(found[:2], expected[:2])
    torch.testing.assert_close(list(found[2].values()), list(expected[2].values()))


def test_eval_mode_exports_to_plain_operators():
    model = residual_network()
    leannorm.fuse(model)
    model.eval()
    x = torch.randn(2, 4, 16, 16)
    program = torch.export.export(model, (x,))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") for name in names), names
    torch.testing.assert_close(program.module()(x), model(x))
