"""A network on our layers against the same network on torch's."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from dlkernels import nn

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative to the largest element of each tensor


def compare_with_torch(
    build: Callable[[ModuleType], torch.nn.Module],
    call: Callable[[torch.nn.Module], Tensor | tuple[Tensor, ...]],
    dtype: torch.dtype,
) -> None:
    """Asserts that a network computes the same on ``dlkernels.nn`` as on ``torch.nn``: names and initial values of the
    state, then outputs, gradients of all parameters and buffers in training, and outputs in evaluation.

    Args:
        build: makes the network from the layers it is given; called with the same seed for both.
        call: the forward pass, with the same inputs of type ``dtype`` each time; called with the same seed too, so that
            dropout agrees.
        dtype: ``torch.float32`` or ``torch.float64``, to which both networks are converted.
    """
    networks = []
    for layers in (nn, torch.nn):
        torch.manual_seed(0)
        networks.append(build(layers).to(dtype))
    ours, torchs = networks
    _assert_equal_states(ours, torchs)
    _perturb_constant_parameters(ours)
    torchs.load_state_dict(ours.state_dict(), strict=True)

    outputs = [_forward(network.train(), call) for network in networks]
    _assert_close("output", *outputs, dtype)
    torch.manual_seed(1)
    cotangents = [torch.randn_like(output) for output in outputs[0]]
    for output in outputs:
        torch.autograd.backward(output, cotangents)
    _assert_equal_gradients(ours, torchs, dtype)
    expected_buffers = dict(torchs.named_buffers())
    for name, buffer in ours.named_buffers():
        _assert_close(name, (buffer,), (expected_buffers[name],), dtype)
    with torch.no_grad():
        _assert_close("output in evaluation", *(_forward(network.eval(), call) for network in networks), dtype)


def _forward(
    network: torch.nn.Module, call: Callable[[torch.nn.Module], Tensor | tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    output = call(network)
    return (output,) if isinstance(output, Tensor) else tuple(output)


def _assert_equal_states(ours: torch.nn.Module, torchs: torch.nn.Module) -> None:
    state, expected = ours.state_dict(), torchs.state_dict()
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), f"initial values of {name} differ"


def _perturb_constant_parameters(network: torch.nn.Module) -> None:
    """Makes norms and zero-initialised biases and heads do something, lest a mistake in them stay unseen."""
    with torch.no_grad():
        for parameter in network.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))


def _assert_equal_gradients(ours: torch.nn.Module, torchs: torch.nn.Module, dtype: torch.dtype) -> None:
    expected = {name: parameter.grad for name, parameter in torchs.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for name, parameter in ours.named_parameters():
        gradient, other = parameter.grad, expected[name]
        assert (gradient is None) == (other is None), f"only one network has a gradient of {name}"
        if gradient is not None and other is not None:
            # The floor is for gradients that are zero but for rounding: of a bias before batch norm, of a key's bias.
            _assert_close(f"gradient of {name}", (gradient,), (other,), dtype, floor=1e-2 * largest)


def _assert_close(
    name: str, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype, floor: float = 0.0
) -> None:
    assert len(actual) == len(expected), name
    for tensor, other in zip(actual, expected, strict=True):
        scale = max(floor, float(other.detach().abs().max()))
        torch.testing.assert_close(
            tensor, other, rtol=0, atol=TOLERANCES[dtype] * scale, msg=lambda message: f"{name}: {message}"
        )
