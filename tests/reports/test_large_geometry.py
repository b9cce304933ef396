"""Kind: strides, paddings and dilations as large as 64 bits allow. A convolution's memory follows its input, weight and
output, whatever windows would span; sizes that 64 bits do not hold are errors."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as torch_functional
from torch import Tensor

import dlkernels
from dlkernels import functional

LARGE = (100, 10**4, 10**6, 2**34, 2**60)
Numbers = int | tuple[int, int]


def naive(
    x: Tensor, w: Tensor, bias: Tensor | None, stride: Numbers, padding: Numbers, dilation: Numbers, groups: int
) -> Tensor:
    """The definition, in float64: a sum over the taps that lie in the image."""
    (sy, sx), (py, px), (dy, dx) = (v if isinstance(v, tuple) else (v, v) for v in (stride, padding, dilation))
    (_, _, H, W), (K, _, kernel_H, kernel_W) = x.shape, w.shape
    rows = (H + 2 * py - dy * (kernel_H - 1) - 1) // sy + 1
    columns = (W + 2 * px - dx * (kernel_W - 1) - 1) // sx + 1
    zero = x.new_zeros(x.shape[0], K) + 0 * x.sum() * w.sum()  # depends on both, whatever the taps meet
    pixels = []
    for i in range(rows):
        for j in range(columns):
            pixel = zero if bias is None else zero + bias
            for a in range(kernel_H):
                for b in range(kernel_W):
                    y, z = i * sy + a * dy - py, j * sx + b * dx - px
                    if 0 <= y < H and 0 <= z < W:
                        parts = zip(x[:, :, y, z].chunk(groups, 1), w[:, :, a, b].chunk(groups, 0), strict=True)
                        pixel = pixel + torch.cat([image @ tap.T for image, tap in parts], 1)
            pixels.append(pixel)
    return torch.stack(pixels, 2).reshape(x.shape[0], K, rows, columns)


@pytest.mark.parametrize("step", [2**62, 3 * 2**60, 2**63 - 1])
def test_a_stride_beyond_the_image_leaves_one_output(isa: str, step: int) -> None:
    output = functional.conv2d(torch.ones(1, 2, 6, 6), torch.ones(3, 2, 3, 3), stride=step)
    assert output.shape == (1, 3, 1, 1) and output.sum() == 54


@pytest.mark.parametrize("step", LARGE)
def test_stride_and_padding_alike_meet_the_image_once(isa: str, step: int) -> None:
    output = functional.conv2d(torch.ones(1, 2, 6, 6), torch.ones(3, 2, 3, 3), stride=step, padding=step)
    assert output.shape == (1, 3, 3, 3) and output.sum() == 54
    assert torch.equal(output[:, :, 1, 1], torch.full((1, 3), 18.0))


GEOMETRIES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Numbers, Numbers, Numbers, int]] = {
    # input, weight, stride, padding, dilation, groups
    "few outputs, far apart": ((2, 4, 6, 5), (6, 4, 3, 3), 10**6, 10**6, 1, 1),
    "taps far apart": ((2, 4, 6, 5), (6, 4, 3, 3), 1, 2**33, 2**33, 1),
    "taps and outputs far apart": ((2, 4, 6, 5), (6, 2, 3, 3), 2**40, 2**40, 2**40 + 1, 2),
    "steps alike": ((1, 3, 7, 6), (2, 3, 4, 3), 1000, 3000, 1000, 1),
    "every output reads several taps": ((2, 3, 6, 6), (2, 3, 5, 5), 997, 998, 2, 1),
    "rows alone": ((2, 3, 6, 9), (4, 3, 3, 3), (10**9, 2), (10**9, 1), 1, 1),
    "columns alone": ((2, 3, 9, 6), (4, 3, 3, 3), (1, 10**9), (2, 10**9), (2, 10**8), 1),
    "depthwise": ((2, 4, 6, 5), (4, 1, 3, 3), 10**6, 10**6, 1, 4),
    "depthwise, taps far apart": ((2, 4, 6, 5), (8, 1, 3, 3), 1, 10**7, 10**7, 4),
    "nothing but padding": ((2, 3, 4, 4), (2, 3, 1, 1), 2**50, 2**49, 1, 1),
    "one output in the padding": ((2, 3, 4, 4), (2, 3, 2, 2), 2**61, 2**60, 1, 1),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_values_and_gradients_are_those_of_the_definition(
    isa: str, dtype: torch.dtype, name: str, channels_last: bool
) -> None:
    shape, kernel, stride, padding, dilation, groups = GEOMETRIES[name]
    # Small integers: exact in every type, so that any other order of summation gives the same.
    x, w = (torch.randint(-2, 3, s).to(dtype) for s in (shape, kernel))
    bias = torch.randint(-2, 3, kernel[:1]).to(dtype)
    if channels_last:
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))

    def gradients(function: Callable[..., Tensor], type_of: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(type_of).requires_grad_() for t in (x, w, bias)]
        output = function(*leaves, stride, padding, dilation, groups)
        torch.manual_seed(1)
        cotangent = torch.randint(-1, 2, output.shape).to(type_of)
        first = torch.autograd.grad(output, leaves, cotangent, create_graph=True)
        second = torch.autograd.grad([g.square().sum() for g in first[:2]], leaves[:2], allow_unused=True)
        second = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, second, strict=False)]
        return [output, *first, *second]

    for ours, expected in zip(gradients(functional.conv2d, dtype), gradients(naive, torch.float64), strict=True):
        assert ours.shape == expected.shape
        assert torch.equal(ours.double(), expected.to(dtype).double())


@pytest.mark.parametrize("name", GEOMETRIES)
def test_fakes_have_the_shapes(name: str) -> None:
    shape, kernel, stride, padding, dilation, groups = GEOMETRIES[name]
    arguments = (None, stride, padding, dilation, groups)
    real = functional.conv2d(torch.randn(shape), torch.randn(kernel), *arguments)
    fake = functional.conv2d(torch.randn(shape, device="meta"), torch.randn(kernel, device="meta"), *arguments)
    assert fake.shape == real.shape and fake.stride() == real.stride()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("kernel", "arguments", "message"),
    [
        (5, {"dilation": 2**62}, "too large"),
        (3, {"dilation": 2**62, "padding": 2**62}, "too large"),
        (3, {"padding": 2**62}, "too large"),
        (3, {"padding": 2**63 - 1}, "too large"),
        (5, {"padding": "same", "dilation": 2**62}, "too large"),
        (3, {"dilation": 2**61}, "Kernel size can't be greater"),
        (7, {}, "Kernel size can't be greater"),
    ],
)
def test_sizes_beyond_64_bits_are_errors(
    isa: str, device: str, kernel: int, arguments: dict[str, int | str], message: str
) -> None:
    x, w = torch.ones(1, 2, 6, 6, device=device), torch.ones(3, 2, kernel, kernel, device=device)
    with pytest.raises(RuntimeError, match=message):
        functional.conv2d(x, w, **arguments)


def test_a_padding_that_fits_with_a_stride_that_fits() -> None:
    large = 2**62 - 8
    output = functional.conv2d(torch.ones(1, 2, 6, 6), torch.ones(3, 2, 3, 3), stride=large, padding=large)
    assert output.shape == (1, 3, 3, 3) and output.sum() == 54


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_the_module_of_every_padding_mode(mode: str) -> None:
    arguments = {"stride": 10**5, "padding": 2, "padding_mode": mode}
    ours = dlkernels.nn.Conv2d(2, 3, 3, **arguments)
    theirs = torch.nn.Conv2d(2, 3, 3, **arguments)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 2, 6, 6)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("step", [10**4, 10**6])
def test_memory_follows_the_operands(isa: str, step: int) -> None:
    x, w = torch.ones(1, 2, 6, 6, requires_grad=True), torch.ones(3, 2, 3, 3, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    functional.conv2d(x, w, None, step, step).sum().backward()
    functional.conv2d(x, w, None, step, 3 * step, step).sum().backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("bias", [False, True])
def test_images_without_elements_give_the_bias(isa: str, dtype: torch.dtype, bias: bool) -> None:
    """Without channels or rows the sum over them is empty, as in a linear layer without features."""
    values = torch.arange(1.0, 4.0, dtype=dtype) if bias else None
    for shape, kernel in (((2, 0, 4, 4), (3, 0, 3, 3)), ((2, 2, 0, 4), (3, 2, 3, 3))):
        x, w = torch.zeros(shape, dtype=dtype, requires_grad=True), torch.ones(kernel, dtype=dtype, requires_grad=True)
        b = None if values is None else values.clone().requires_grad_()
        output = functional.conv2d(x, w, b, padding=2)
        expected = torch.zeros(output.shape, dtype=dtype)
        assert torch.equal(output, expected if values is None else expected + values.reshape(3, 1, 1))
        output.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
        assert w.grad is not None and torch.equal(w.grad, torch.zeros_like(w))
        if b is not None:
            assert torch.equal(b.grad, torch.full_like(b, output[:, 0].numel()))


def test_torch_has_no_channels_where_there_are_none() -> None:
    """The difference that docs/operations/conv2d.md names; torch is to be followed if it comes to give the bias."""
    x, w = torch.zeros(2, 0, 4, 4), torch.zeros(3, 0, 3, 3)
    assert torch_functional.conv2d(x, w).shape == (2, 0, 2, 2)
    assert functional.conv2d(x, w).shape == (2, 3, 2, 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: functional.linear(torch.zeros(1, 1, 0).expand(2**40, 2**40, 0), torch.zeros(4, 0)),
        lambda: functional.cross_entropy(
            torch.zeros(1, 0, 1).expand(2**40, 0, 2**40), torch.zeros(1, 1, dtype=torch.long).expand(2**20, 2**20)
        ),
        lambda: functional.conv2d(torch.zeros(1, 1, 4, 4).expand(2**50, 1, 4, 4), torch.zeros(2**12, 1, 1, 1)),
        lambda: functional.linear(torch.zeros(1, 1).expand(2**40, 1), torch.zeros(1, 1).expand(2**40, 1)),
        lambda: functional.lstm(
            torch.zeros(1, 1, 0).expand(2**40, 2**40, 0),
            (torch.zeros(1, 1, 4).expand(1, 2**40, 4), torch.zeros(1, 1, 4).expand(1, 2**40, 4)),
            [torch.zeros(16, 0), torch.zeros(16, 4)],
            False,
            1,
            0.0,
            False,
            False,
            False,
        ),
        lambda: functional.linear_cross_entropy(
            torch.zeros(1, 1).expand(2**62, 1), torch.zeros(4, 1), torch.zeros(1, dtype=torch.long).expand(2**62)
        ),
    ],
    ids=["linear", "cross_entropy", "conv2d", "linear, large weight", "lstm", "linear_cross_entropy"],
)
def test_counts_beyond_memory_are_errors(call: Callable[[], Tensor]) -> None:
    """Operands that lie on one element each: refused, or out of memory, and nothing is written."""
    with pytest.raises((RuntimeError, ValueError, MemoryError)):
        call()
