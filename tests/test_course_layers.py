"""The layers of the course that torch lacks: stochastic depth, maxout, DropConnect."""

from __future__ import annotations

import pytest
import torch

from dlkernels import nn

from .cases.reference import import_torchvision

# ---- Stochastic depth ------------------------------------------------------------------------------------------------


def test_stochastic_depth_drops_whole_rows_and_keeps_the_mean() -> None:
    layer = nn.StochasticDepth(0.25, "row")
    output = layer(torch.ones(4000, 3, 2))
    assert torch.equal(output, output[:, :1, :1].expand_as(output))
    torch.testing.assert_close(output.unique(), torch.tensor([0.0, 1 / (1 - 0.25)]))
    assert output.eq(0).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_stochastic_depth_of_a_batch_decides_once() -> None:
    layer = nn.StochasticDepth(0.5, "batch")
    outputs = [layer(torch.ones(5, 2)) for _ in range(40)]
    assert all(len(output.unique()) == 1 for output in outputs)
    assert {output[0, 0].item() for output in outputs} == {0.0, 2.0}


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth_does_nothing_in_evaluation_or_without_probability(mode: str) -> None:
    x = torch.randn(4, 3)
    assert nn.StochasticDepth(0.9, mode).eval()(x) is x
    assert nn.StochasticDepth(0.0, mode)(x) is x


def test_stochastic_depth_of_certainty_leaves_nothing() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    output = nn.StochasticDepth(1.0, "row")(x)
    output.sum().backward()
    assert output.eq(0).all()
    assert x.grad is not None and x.grad.eq(0).all()


def test_stochastic_depth_scales_the_gradient_as_the_output() -> None:
    x = torch.ones(64, 3, requires_grad=True)
    output = nn.StochasticDepth(0.5, "row")(x)
    output.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, output)


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_stochastic_depth_draws_as_torchvisions(p: float, mode: str) -> None:
    x = torch.randn(16, 3, 2)
    outputs = []
    for layer in (nn.StochasticDepth(p, mode), import_torchvision().ops.StochasticDepth(p, mode)):
        torch.manual_seed(0)
        outputs.append(layer(x))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_probabilities_outside_zero_to_one_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match=f"p must be between 0 and 1, got {p}"):
        nn.StochasticDepth(p, "row")
    with pytest.raises(ValueError, match=f"p must be between 0 and 1, got {p}"):
        nn.DropConnectLinear(3, 2, p=p)


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="mode must be 'batch' or 'row', got 'column'"):
        nn.StochasticDepth(0.5, "column")


# ---- Maxout ----------------------------------------------------------------------------------------------------------


def test_maxout_is_the_largest_of_its_pieces() -> None:
    layer = nn.Maxout(4, 3, pieces=5).double()
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    weight = layer.linear.weight.view(3, 5, 4)
    bias = layer.linear.bias.view(3, 5)
    expected = torch.stack([(x @ weight[:, piece].T + bias[:, piece]) for piece in range(5)]).max(0).values
    assert layer(x).shape == (2, 6, 3)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)


def test_maxout_can_be_relu_and_the_absolute_value() -> None:
    x = torch.randn(100, 1)
    layer = nn.Maxout(1, 2, pieces=2, bias=False)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.tensor([[1.0], [0.0], [1.0], [-1.0]]))
    torch.testing.assert_close(layer(x), torch.cat([x.relu(), x.abs()], 1), rtol=0, atol=0)


def test_maxout_passes_gradcheck() -> None:
    layer = nn.Maxout(3, 2, pieces=3).double()
    assert torch.autograd.gradcheck(layer, torch.randn(4, 3, dtype=torch.float64, requires_grad=True))


def test_maxout_refuses_to_have_no_piece() -> None:
    with pytest.raises(ValueError, match="pieces must be positive, got 0"):
        nn.Maxout(3, 2, pieces=0)


# ---- DropConnect -----------------------------------------------------------------------------------------------------


def test_drop_connect_drops_weights_and_not_biases() -> None:
    layer = nn.DropConnectLinear(8, 500, p=0.25)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(0.5)
    kept = (layer(torch.eye(8)) - layer.bias).T  # [500, 8], the weights that were used
    torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 1 / (1 - 0.25)]))
    assert kept.eq(0).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_drop_connect_gives_a_dropped_weight_no_gradient() -> None:
    layer = nn.DropConnectLinear(6, 4, bias=False, p=0.5)
    used = layer(torch.eye(6)).T / layer.weight  # 0 or 2
    used.mul(layer.weight).sum().backward()
    torch.testing.assert_close(layer.weight.grad, used.detach())
    assert 0 < used.eq(0).sum() < used.numel()


def test_drop_connect_in_evaluation_is_the_linear_layer_whose_weights_it_loads() -> None:
    linear = torch.nn.Linear(5, 3)
    layer = nn.DropConnectLinear(5, 3, p=0.7).eval()
    layer.load_state_dict(linear.state_dict(), strict=True)
    x = torch.randn(4, 5)
    torch.testing.assert_close(layer(x), linear(x))


def test_drop_connect_has_the_mean_of_its_evaluation() -> None:
    layer = nn.DropConnectLinear(5, 3, p=0.5).double()
    x = torch.randn(1, 5, dtype=torch.float64)
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, layer.eval()(x), rtol=0, atol=0.05)
