"""``nn.Sequential``: torch's, with a batch norm and the ReLU after it in one kernel."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from dlkernels import nn


def build(layers: ModuleType) -> torch.nn.Sequential:
    torch.manual_seed(0)
    norms = [layers.BatchNorm2d(5) for _ in range(3)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    return layers.Sequential(norms[0], torch.nn.ReLU(), torch.nn.ReLU6(), norms[1], torch.nn.Sigmoid(), norms[2])


@pytest.mark.parametrize("training", [True, False])
def test_it_computes_what_torchs_does_and_a_norm_with_its_relu_in_one_kernel(training: bool) -> None:
    ours, peer = build(nn).train(training), build(torch.nn).train(training)
    assert list(ours.state_dict()) == list(peer.state_dict())
    x = torch.randn(3, 5, 4, 6)
    with torch.profiler.profile() as profile:
        y = ours(x)
    names = {event.key for event in profile.key_averages()}
    assert "dlkernels::batch_norm" in names and "aten::relu" not in names
    torch.testing.assert_close(y, peer(x))


def test_a_hook_on_the_relu_sees_its_call() -> None:
    model = build(nn)
    seen: list[torch.Tensor] = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(3, 5, 4, 6)
    model(x)
    torch.testing.assert_close(seen, [build(torch.nn)[:2](x)])


def test_a_slice_is_one_too() -> None:
    assert type(build(nn)[1:]) is nn.Sequential
    assert nn.Sequential()(3) == 3
