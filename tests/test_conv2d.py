"""What is particular to conv2d: its arguments and errors, both memory layouts, sizes at the edges, and the module."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.common_modules import module_db

from dlkernels import functional as F
from dlkernels import nn
from dlkernels.ops.conv2d import Conv2dFunction

from .cases import normal


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*shape, seed=1, dtype=dtype)


def kernels(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*shape, seed=2, dtype=dtype)


def gradients(function: Any, args: list[Tensor], *rest: Any, layout: torch.memory_format) -> list[Tensor]:
    leaves = [a.detach().contiguous(memory_format=layout if a.dim() == 4 else torch.contiguous_format) for a in args]
    for leaf in leaves:
        leaf.requires_grad_()
    output = function(*leaves, *rest)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return [output, *torch.autograd.grad(output, leaves, grad.contiguous(memory_format=layout))]


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [2, (2,), [2], (2, 1), [2, 1], torch.Size([2, 2])], ids=str)
@pytest.mark.parametrize("padding", [1, (1,), (0, 2), "valid"], ids=str)
def test_numbers_are_spelled_as_in_torch(stride: Any, padding: Any) -> None:
    x, w = images(1, 3, 8, 9), kernels(4, 3, 3, 2)
    expected = torch.nn.functional.conv2d(x, w, None, stride, padding)
    torch.testing.assert_close(F.conv2d(x, w, None, stride, padding), expected)


@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (4, 4)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)], ids=str)
def test_same_padding_keeps_the_size(kernel: tuple[int, int], dilation: Any) -> None:
    x, w = images(2, 2, 9, 10), kernels(3, 2, *kernel)
    actual = F.conv2d(x, w, padding="same", dilation=dilation)
    assert actual.shape == (2, 3, 9, 10)
    torch.testing.assert_close(actual, torch.nn.functional.conv2d(x, w, padding="same", dilation=dilation))


# What is wrong, the call, and what the message says.
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "input rank": ((images(8, 8), kernels(4, 3, 3, 3)), {}, r"Expected 3D \(unbatched\) or 4D \(batched\) input"),
    "weight rank": ((images(1, 3, 8, 8), kernels(3, 3, 3)), {}, "4-dimensional weight"),
    "channels": ((images(1, 4, 8, 8), kernels(4, 3, 3, 3)), {}, "to have 3 channels, but got 4 channels"),
    "groups": ((images(1, 4, 8, 8), kernels(5, 2, 3, 3)), {"groups": 2}, "divisible by 2 at dimension 0"),
    "few outputs": ((images(1, 4, 8, 8), kernels(1, 2, 3, 3)), {"groups": 2}, "at least 2 at dimension 0"),
    "no groups": ((images(1, 4, 8, 8), kernels(4, 4, 3, 3)), {"groups": 0}, "non-positive groups"),
    "bias size": ((images(1, 4, 8, 8), kernels(4, 4, 3, 3), images(3)), {}, "1-dimensional with 4 elements"),
    "bias rank": ((images(1, 4, 8, 8), kernels(4, 4, 3, 3), images(4, 1)), {}, "1-dimensional with 4 elements"),
    "weight type": ((images(1, 4, 8, 8), kernels(4, 4, 3, 3).double()), {}, "should be the same"),
    "bias type": ((images(1, 4, 8, 8), kernels(4, 4, 3, 3), images(4).half()), {}, "should be the same"),
    "integers": ((images(1, 4, 8, 8).int(), kernels(4, 4, 3, 3).int()), {}, "input is Int"),
    "stride": ((images(1, 4, 8, 8), kernels(4, 4, 3, 3)), {"stride": (1, 0)}, "non-positive stride"),
    "stride length": ((images(1, 4, 8, 8), kernels(4, 4, 3, 3)), {"stride": (1, 1, 1)}, "list of 2 values"),
    "padding": ((images(1, 4, 8, 8), kernels(4, 4, 3, 3)), {"padding": -1}, "negative padding"),
    "padding text": ((images(1, 4, 8, 8), kernels(4, 4, 3, 3)), {"padding": "all"}, "Invalid padding string: 'all'"),
    "same strided": (
        (images(1, 4, 8, 8), kernels(4, 4, 3, 3)),
        {"padding": "same", "stride": 2},
        "padding='same' is not supported for strided convolutions",
    ),
    "dilation": ((images(1, 4, 8, 8), kernels(4, 4, 3, 3)), {"dilation": 0}, "dilation should be greater than zero"),
    "large kernel": ((images(1, 4, 8, 2), kernels(4, 4, 3, 3)), {}, r"\(8 x 2\). Kernel size: \(3 x 3\)"),
    "empty kernel": ((images(1, 4, 8, 8), kernels(4, 4, 0, 3)), {}, "kernel size should be greater than zero"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_arguments_are_named(name: str) -> None:
    args, kwargs, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        F.conv2d(*args, **kwargs)


@pytest.mark.parametrize(
    "argument", [{"stride": 1.5}, {"padding": None}, {"groups": "2"}, {"dilation": (1, 2.5)}], ids=str
)
def test_arguments_of_another_kind_are_type_errors(argument: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        F.conv2d(images(1, 2, 4, 4), kernels(2, 2, 3, 3), **argument)


# ---- layouts ---------------------------------------------------------------------------------------------------------

SHAPES = [
    ((2, 20, 9, 7), (18, 20, 3, 3), 1, 1, 1, 1),
    ((2, 3, 17, 18), (16, 3, 5, 5), 2, 2, 1, 1),
    ((3, 33, 5, 6), (34, 33, 1, 1), 1, 0, 1, 1),
    ((2, 8, 9, 8), (12, 4, 3, 3), 1, 2, 2, 2),
]
DEPTHWISE = ((2, 18, 9, 8), (18, 1, 3, 3), 2, 1, 1, 18)


def check_bits_of_both_layouts(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    args = [images(*shape[0], dtype=dtype), kernels(*shape[1], dtype=dtype), images(shape[1][0], dtype=dtype)]
    planar = gradients(F.conv2d, args, *shape[2:], layout=torch.contiguous_format)
    last = gradients(F.conv2d, args, *shape[2:], layout=torch.channels_last)
    for a, b in zip(planar, last, strict=True):
        assert torch.equal(a, b)
    assert last[0].is_contiguous(memory_format=torch.channels_last)
    assert last[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channels_last_gives_the_same_bits(shape: tuple[Any, ...], dtype: torch.dtype, isa: str) -> None:
    check_bits_of_both_layouts(shape, dtype)


def test_channels_last_gives_the_same_bits_depthwise(dtype: torch.dtype, processor_isa: str) -> None:
    """CUDA's sums over pixels follow the order in which lanes read them."""
    check_bits_of_both_layouts(DEPTHWISE, dtype)


@pytest.mark.parametrize("input_last", [False, True])
@pytest.mark.parametrize("weight_last", [False, True])
def test_the_output_has_the_memory_format_that_torch_gives(input_last: bool, weight_last: bool) -> None:
    x, w = images(2, 6, 8, 9), kernels(5, 6, 3, 3)
    x = x.contiguous(memory_format=torch.channels_last) if input_last else x
    w = w.contiguous(memory_format=torch.channels_last) if weight_last else w
    actual, expected = F.conv2d(x, w), torch.nn.functional.conv2d(x, w)
    assert actual.stride() == expected.stride()
    meta = F.conv2d(x.to("meta"), w.to("meta"))
    assert meta.stride() == actual.stride()
    with torch.no_grad():
        compiled = torch.compile(F.conv2d, fullgraph=True, backend="aot_eager")(x, w)
    assert torch.equal(compiled, actual) and compiled.stride() == actual.stride()


# ---- shapes ----------------------------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels, outputs = groups * draw(st.integers(1, 20)), groups * draw(st.integers(1, 20))
    kernel = [draw(st.integers(1, 5)) for _ in range(2)]
    stride = tuple(draw(st.integers(1, 4)) for _ in range(2))
    padding = tuple(draw(st.integers(0, 4)) for _ in range(2))
    dilation = tuple(draw(st.integers(1, 3)) for _ in range(2))
    extents = [(k - 1) * d + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = [draw(st.integers(max(1, e), max(1, e) + 12)) for e in extents]
    shape = (draw(st.integers(1, 4)), channels, *size)
    return shape, (outputs, channels // groups, *kernel), (stride, padding, dilation, groups)


@given(call=calls(), layout=st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_any_shape_gives_what_torch_gives(call: Any, layout: torch.memory_format) -> None:
    input, weight, numbers = call
    args = [images(*input), kernels(*weight), images(weight[0])]
    actual = gradients(F.conv2d, args, *numbers, layout=layout)
    double = [a.double() for a in args]
    expected = gradients(torch.nn.functional.conv2d, double, *numbers, layout=torch.contiguous_format)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5 * max(1.0, float(e.detach().abs().max())))


@pytest.mark.parametrize(("multiplier", "shape"), [(1, (2, 70, 13, 11)), (2, (1, 5, 9, 9)), (1, (3, 2, 40, 33))])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise(multiplier: int, shape: tuple[int, ...], kernel: int, stride: int, isa: str) -> None:
    channels = shape[1]
    args = [images(*shape), kernels(multiplier * channels, 1, kernel, kernel), images(multiplier * channels)]
    numbers = (stride, kernel // 2, 1, channels)
    actual = gradients(F.conv2d, args, *numbers, layout=torch.contiguous_format)
    expected = gradients(
        torch.nn.functional.conv2d, [a.double() for a in args], *numbers, layout=torch.contiguous_format
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5 * max(1.0, float(e.detach().abs().max())))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (0, 3, 0, 8)], ids=str)
def test_an_empty_batch(shape: tuple[int, ...]) -> None:
    x, w, b = images(*shape).requires_grad_(), kernels(4, 3, 3, 3).requires_grad_(), images(4).requires_grad_()
    output = F.conv2d(x, w, b, padding=2)
    assert output.shape == (0, 4, shape[2] + 2, 10)
    output.sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(w.grad, torch.zeros_like(w)) and torch.equal(b.grad, torch.zeros(4))


def test_no_input_channels_leave_the_bias() -> None:
    """torch gives [N, 0, H, W], which drops the bias and its gradient, and no longer has the channels of the weight."""
    x, w, b = images(2, 0, 5, 5).requires_grad_(), kernels(4, 0, 3, 3).requires_grad_(), images(4).requires_grad_()
    output = F.conv2d(x, w, b)
    assert torch.equal(output, b.detach().view(1, 4, 1, 1).expand(2, 4, 3, 3))
    output.sum().backward()
    assert torch.equal(b.grad, torch.full((4,), 18.0)) and w.grad.shape == w.shape and x.grad.shape == x.shape


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("shape", "outputs", "groups", "dilation"),
    [
        ((2, 20, 9, 7), 18, 1, 1),
        ((1, 3, 17, 18), 16, 1, 1),  # few input channels: the output channels are the lanes
        ((2, 6, 12, 11), 10, 2, 2),
        ((2, 19, 8, 9), 19, 19, 1),
    ],
    ids=["dense", "few_channels", "grouped_dilated", "depthwise"],
)
def test_padding_adds_nothing_to_the_gradient_of_the_weight(
    shape: tuple[int, ...],
    outputs: int,
    groups: int,
    dilation: int,
    layout: torch.memory_format,
    value: float,
    processor_isa: str,
) -> None:
    """Not even where the incoming gradient is not finite; CUDA's, and torch's without oneDNN, make that NaN."""
    x = images(*shape).contiguous(memory_format=layout)
    w = kernels(outputs, shape[1] // groups, 3, 3).requires_grad_()
    output = F.conv2d(x, w, None, 1, dilation, dilation, groups)
    grad = normal(*output.shape, seed=3, dtype=torch.float32)
    grad[0, 0, 0, 0] = 0.0
    (finite,) = torch.autograd.grad(output, w, grad, retain_graph=True)
    grad[0, 0, 0, 0] = value
    (actual,) = torch.autograd.grad(output, w, grad)
    torch.testing.assert_close(actual[1:], finite[1:])
    torch.testing.assert_close(actual[:, :, 0], finite[:, :, 0])  # the taps above and to the left of the first pixel
    torch.testing.assert_close(actual[:, :, :, 0], finite[:, :, :, 0])
    assert not actual[0, :, 1:, 1:].isfinite().any()


def one_running_sum(x: Tensor, w: Tensor) -> Tensor:
    """The convolution with padding 1, all products of an output added one after another in float32."""
    columns, weight = torch.nn.functional.unfold(x, 3, padding=1), w.flatten(1)
    total = torch.zeros(x.size(0), w.size(0), columns.size(2))
    for product in range(columns.size(1)):
        total += weight[:, product, None] * columns[:, None, product]
    return total.unflatten(2, x.shape[2:])


@pytest.mark.parametrize("channels", [128, 200])
def test_wide_3x3_kernels_are_as_accurate_as_one_running_sum(channels: int, isa: str) -> None:
    """Winograd's transforms round as well; the runs of sums are short enough to make up for it."""
    x, w = images(2, channels, 12, 20), kernels(48, channels, 3, 3)
    exact = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)

    def error(values: Tensor) -> float:
        return float((values.double() - exact).norm() / exact.norm())

    assert error(F.conv2d(x, w, padding=1)) <= error(one_running_sum(x, w))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_numbers_that_overflow_in_a_transform_do_not_in_the_result(
    layout: torch.memory_format, processor_isa: str
) -> None:
    x, w = images(2, 32, 10, 12).contiguous(memory_format=layout), kernels(32, 32, 3, 3)
    x[1, 3, 4, 5] = 3e38  # its products with the smaller weights are finite
    output = F.conv2d(x, w, padding=1)
    expected = torch.nn.functional.conv2d(x.double(), w.double(), padding=1).clamp(-3.5e38, 3.5e38)
    finite = expected.abs() < 3.4e38
    assert torch.equal(output.isfinite(), finite) and not finite.all()
    torch.testing.assert_close(output[finite].double(), expected[finite], rtol=1e-5, atol=1e-3)


def test_gradients_only_where_asked() -> None:
    x, w, b = images(2, 3, 6, 6), kernels(4, 3, 3, 3).requires_grad_(), images(4)
    F.conv2d(x, w, b).sum().backward()
    assert x.grad is None and b.grad is None and w.grad is not None
    grads = torch.ops.dlkernels.conv2d_backward(
        images(2, 4, 4, 4), x, w.detach(), [1, 1], [0, 0, 0, 0], [1, 1], 1, [False, False, True]
    )
    torch.testing.assert_close(grads[2], images(2, 4, 4, 4).sum((0, 2, 3)))


def test_the_python_function_agrees() -> None:
    args = [t.requires_grad_() for t in (images(2, 4, 6, 7), kernels(6, 2, 3, 3), images(6))]
    numbers = ([1, 2], [1, 0, 2, 1], [1, 1], 2)
    ours = Conv2dFunction.apply(*args, *numbers)
    operator = torch.ops.dlkernels.conv2d(*args, *numbers)
    assert torch.equal(ours, operator)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), args), torch.autograd.grad(operator.square().sum(), args), strict=True
    ):
        assert torch.equal(a, b)


def test_third_gradients() -> None:
    x, w = images(1, 2, 4, 4, dtype=torch.float64).requires_grad_(), kernels(2, 2, 2, 2, dtype=torch.float64)
    w.requires_grad_()

    def third(function: Any) -> Tensor:
        (first,) = torch.autograd.grad(function(x, w).pow(4).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), w, create_graph=True)
        return torch.autograd.grad(second.pow(2).sum(), x)[0]

    torch.testing.assert_close(third(F.conv2d), third(torch.nn.functional.conv2d))


# ---- the module ------------------------------------------------------------------------------------------------------

MODULE_INFO = next(info for info in module_db if info.module_cls is torch.nn.Conv2d)


@pytest.mark.parametrize("training", [True, False])
def test_module_samples(training: bool, dtype: torch.dtype) -> None:
    samples = MODULE_INFO.module_inputs_func(
        MODULE_INFO, device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    for sample in samples:
        theirs = torch.nn.Conv2d(*sample.constructor_input.args, **sample.constructor_input.kwargs, dtype=dtype)
        ours = nn.Conv2d(*sample.constructor_input.args, **sample.constructor_input.kwargs, dtype=dtype)
        ours.load_state_dict(theirs.state_dict())
        args = sample.forward_input.args
        actual, expected = ours(*args), theirs(*args)
        torch.testing.assert_close(actual, expected, msg=lambda text, s=sample: f"{s.desc}: {text}")


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same"], ids=str)
def test_padding_modes(mode: str, padding: Any) -> None:
    theirs = torch.nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode)
    ours = nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(images(2, 3, 7, 8)), theirs(images(2, 3, 7, 8)))


def test_module_is_torchs_with_other_kernels() -> None:
    theirs = torch.nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=2, groups=2, bias=False)
    ours = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=2, groups=2, bias=False)
    assert isinstance(ours, torch.nn.Conv2d) and repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = images(1, 4, 9, 9)
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(clone) is nn.Conv2d and torch.equal(clone(x), ours(x))
    last = copy.deepcopy(ours).to(memory_format=torch.channels_last)
    assert torch.equal(last(x.contiguous(memory_format=torch.channels_last)), ours(x))
