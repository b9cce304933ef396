"""Bad input that every operation refuses alike; what is particular to an operation is in its own tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dlkernels import functional as F
from dlkernels import nn

from .cases import Case, Sample, all_cases, call


def tensors_of(case: Case) -> list[Tensor]:
    sample = case.build(torch.float32)
    return [value for value in (*sample.args, *sample.kwargs.values()) if isinstance(value, Tensor)]


SEVERAL_TENSORS = [case for case in all_cases() if len(tensors_of(case)) > 1]
SEVERAL_FLOATING = [case for case in all_cases() if sum(t.is_floating_point() for t in tensors_of(case)) > 1]


def with_one_changed(
    case: Case, change: Callable[[Tensor], Tensor], chosen: Callable[[Tensor], bool]
) -> Iterator[tuple[str, Sample]]:
    """The call once for every chosen tensor, positional or named, with that tensor changed."""
    original = case.build(torch.float32)
    for position, value in enumerate(original.args):
        if isinstance(value, Tensor) and chosen(value):
            args = list(original.args)
            args[position] = change(value)
            yield f"argument {position}", Sample(tuple(args), original.kwargs)
    for name, value in original.kwargs.items():
        if isinstance(value, Tensor) and chosen(value):
            yield name, Sample(original.args, {**original.kwargs, name: change(value)})


@pytest.mark.parametrize("case", SEVERAL_TENSORS, ids=str)
def test_a_tensor_on_another_device_is_refused(case: Case) -> None:
    for where, changed in with_one_changed(case, lambda t: t.to("meta"), lambda t: True):
        if where != "batch_sizes":  # on the CPU whatever the device of the others
            with pytest.raises(RuntimeError, match="same device"):
                call(case.function, changed)


def promotes(case: Case, changed: Sample) -> bool:
    if "cross_entropy" not in case.column:
        return False
    try:
        return call(case.reference, changed)[0].dtype == torch.float64
    except RuntimeError:
        return False


@pytest.mark.parametrize("case", SEVERAL_FLOATING, ids=str)
def test_mixed_types_are_refused(case: Case) -> None:
    """But for class probabilities and the weights beside them, which torch promotes."""
    for _, changed in with_one_changed(case, Tensor.double, Tensor.is_floating_point):
        if promotes(case, changed):
            assert call(case.function, changed)[0].dtype == torch.float64
            continue
        with pytest.raises(RuntimeError, match="(?i)double"):
            call(case.function, changed)


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_a_tensor_without_kernels_is_told_what_was_built(case: Case) -> None:
    """Sparse, as one on another device is, which this machine need not have."""
    _, changed = next(with_one_changed(case, Tensor.to_sparse, Tensor.is_floating_point))
    with pytest.raises(NotImplementedError, match="torch.sparse_coo.*this build has kernels for the CPU"):
        call(case.function, changed)


def rand(*shape: int) -> Tensor:
    return torch.full(shape, 0.5)


IMAGE, KERNEL, CHANNELS = rand(2, 3, 8, 8), rand(4, 3, 3, 3), rand(3)
ROWS, MATRIX = rand(2, 3), rand(4, 3)
LOGITS, TARGET = rand(4, 5), torch.tensor([0, 1, 2, 3])
HIDDEN, CLASSES = rand(4, 6), rand(5, 6)
HEADS = rand(2, 4, 7, 8)
STATE, STATES = rand(2, 4), rand(1, 2, 4)
INPUT_GATES, STATE_GATES, BIAS = rand(16, 3), rand(16, 4), rand(16)
SEQUENCE, LAYER = rand(5, 2, 3), [INPUT_GATES, STATE_GATES, BIAS, BIAS]
OPTIONS = (True, 1, 0.0, False, False)

# The function, its arguments with one of them wrong, its options, and what the message must say beside the function's
# name: the argument, what was got, what was expected.
Misuse = tuple[Callable[..., object], tuple[object, ...], dict[str, object], tuple[str, ...]]
MISUSES: dict[str, Misuse] = {
    "conv2d type": (F.conv2d, (IMAGE.long(), KERNEL.long()), {}, ("input is Long", "float32, float64")),
    "conv2d dimensions": (F.conv2d, (IMAGE[0, 0], KERNEL), {}, ("[8, 8]", "3D", "4D")),
    "conv2d channels": (F.conv2d, (IMAGE, rand(4, 5, 3, 3)), {}, ("5 channels", "got 3 channels")),
    "conv2d weight": (F.conv2d, (IMAGE, KERNEL[0]), {}, ("[3, 3, 3]", "4-dimensional weight")),
    "conv2d bias": (F.conv2d, (IMAGE, KERNEL, BIAS), {}, ("bias", "4 elements", "[16]")),
    "conv2d bias type": (F.conv2d, (IMAGE, KERNEL, rand(4).double()), {}, ("bias", "Float", "Double")),
    "conv2d kernel size": (F.conv2d, (IMAGE, rand(4, 3, 9, 9)), {}, ("(8 x 8)", "(9 x 9)")),
    "conv2d stride": (F.conv2d, (IMAGE, KERNEL), {"stride": 0}, ("stride", "positive", "[0, 0]")),
    "conv2d strides": (F.conv2d, (IMAGE, KERNEL), {"stride": (1, 1, 1)}, ("stride", "2 values", "[1, 1, 1]")),
    "conv2d stride type": (F.conv2d, (IMAGE, KERNEL), {"stride": "a"}, ("stride must be an int", "got str")),
    "conv2d padding": (F.conv2d, (IMAGE, KERNEL), {"padding": "full"}, ("padding", "'full'", "'same'")),
    "conv2d negative": (F.conv2d, (IMAGE, KERNEL), {"padding": -1}, ("padding", "negative", "-1")),
    "conv2d dilation": (F.conv2d, (IMAGE, KERNEL), {"dilation": 0}, ("dilation", "greater", "[0, 0]")),
    "conv2d groups": (F.conv2d, (IMAGE, KERNEL), {"groups": 0}, ("groups", "positive", "0")),
    "conv2d array": (F.conv2d, ([1.0], KERNEL), {}, ("input must be a Tensor", "got list")),
    "batch_norm type": (
        F.batch_norm,
        (IMAGE.long(), None, None),
        {"training": True},
        ("Long", "float32"),
    ),
    "batch_norm dimensions": (F.batch_norm, (CHANNELS, CHANNELS, CHANNELS), {}, ("[N, C, ...]", "[3]")),
    "batch_norm mean": (F.batch_norm, (IMAGE, rand(4), rand(4)), {}, ("running_mean", "3", "4")),
    "batch_norm mean type": (
        F.batch_norm,
        (IMAGE, CHANNELS.double(), CHANNELS),
        {},
        ("running_mean is Double", "expected Float"),
    ),
    "batch_norm weight": (F.batch_norm, (IMAGE, CHANNELS, CHANNELS, rand(4)), {}, ("weight", "3 elements", "4")),
    "batch_norm nothing": (F.batch_norm, (IMAGE, None, None), {}, ("running_mean", "evaluation mode")),
    "batch_norm variance": (
        F.batch_norm,
        (IMAGE, CHANNELS, None),
        {"training": True},
        ("running_mean and running_var", "both be None"),
    ),
    "batch_norm eps": (F.batch_norm, (IMAGE, CHANNELS, CHANNELS), {"eps": -1.0}, ("non-negative", "-1")),
    "batch_norm eps training": (
        F.batch_norm,
        (IMAGE, CHANNELS, CHANNELS),
        {"training": True, "eps": 0.0},
        ("eps must be positive", "got 0"),
    ),
    "batch_norm activation": (
        F.batch_norm,
        (IMAGE, CHANNELS, CHANNELS),
        {"activation": "gelu"},
        ("activation", "'relu6'", "'gelu'"),
    ),
    "batch_norm residual": (
        F.batch_norm,
        (IMAGE, CHANNELS, CHANNELS),
        {"residual": IMAGE[:1]},
        ("residual", "[2, 3, 8, 8]", "[1, 3, 8, 8]"),
    ),
    "linear type": (F.linear, (ROWS.long(), MATRIX.long()), {}, ("input is Long", "float32")),
    "linear features": (F.linear, (ROWS, rand(4, 5)), {}, ("input has shape [2, 3]", "weight [4, 5]")),
    "linear weight": (F.linear, (ROWS, rand(4, 5, 3)), {}, ("[out_features, in_features]", "[4, 5, 3]")),
    "linear bias": (F.linear, (ROWS, MATRIX, CHANNELS), {}, ("bias", "[4]", "[3]")),
    "linear bias type": (F.linear, (ROWS, MATRIX, rand(4).double()), {}, ("bias", "Float", "Double")),
    "cross_entropy type": (F.cross_entropy, (LOGITS.long(), TARGET), {}, ("Long", "float32")),
    "cross_entropy class": (F.cross_entropy, (LOGITS, TARGET + 2), {}, ("Target 5", "out of bounds", "[0, 5)", "-100")),
    "cross_entropy target": (F.cross_entropy, (LOGITS, TARGET.int()), {}, ("target", "Long or Byte", "Int")),
    "cross_entropy batch": (F.cross_entropy, (LOGITS, TARGET[:3]), {}, ("input batch_size (4)", "target", "(3)")),
    "cross_entropy weight": (F.cross_entropy, (LOGITS, TARGET, rand(4)), {}, ("weight", "5 classes", "[4]")),
    "cross_entropy reduction": (
        F.cross_entropy,
        (LOGITS, TARGET),
        {"reduction": "avg"},
        ("avg", "reduction", "'mean'"),
    ),
    "cross_entropy smoothing": (
        F.cross_entropy,
        (LOGITS, TARGET),
        {"label_smoothing": 2.0},
        ("label_smoothing", "between 0.0 and 1.0", "2"),
    ),
    "linear_cross_entropy type": (
        F.linear_cross_entropy,
        (HIDDEN.long(), CLASSES.long(), TARGET),
        {},
        ("input is Long", "float32"),
    ),
    "linear_cross_entropy features": (
        F.linear_cross_entropy,
        (HIDDEN, MATRIX, TARGET),
        {},
        ("input and linear_weight", "6 and 3"),
    ),
    "linear_cross_entropy bias": (
        F.linear_cross_entropy,
        (HIDDEN, CLASSES, TARGET),
        {"linear_bias": BIAS},
        ("linear_bias", "(5,)", "(16,)"),
    ),
    "linear_cross_entropy target": (
        F.linear_cross_entropy,
        (HIDDEN, CLASSES, TARGET.int()),
        {},
        ("target", "Long or Byte", "Int"),
    ),
    "linear_cross_entropy reduction": (
        F.linear_cross_entropy,
        (HIDDEN, CLASSES, TARGET),
        {"reduction": "avg"},
        ("avg", "reduction", "'mean'"),
    ),
    "attention type": (
        F.scaled_dot_product_attention,
        (HEADS.long(), HEADS.long(), HEADS.long()),
        {},
        ("query is Long", "float32"),
    ),
    "attention size": (
        F.scaled_dot_product_attention,
        (HEADS, HEADS[..., :7], HEADS),
        {},
        ("query [2, 4, 7, 8]", "key [2, 4, 7, 7]", "same last dimension"),
    ),
    "attention length": (
        F.scaled_dot_product_attention,
        (HEADS, HEADS[..., :6, :], HEADS),
        {},
        ("key [2, 4, 6, 8]", "value [2, 4, 7, 8]"),
    ),
    "attention groups": (
        F.scaled_dot_product_attention,
        (HEADS, HEADS[:, :3], HEADS[:, :3]),
        {"enable_gqa": True},
        ("heads in key and value must divide", "4 in query", "3 in key"),
    ),
    "attention mask": (
        F.scaled_dot_product_attention,
        (HEADS, HEADS, HEADS, MATRIX.bool()),
        {},
        ("attn_mask", "[4, 3]", "[2, 4, 7, 7]"),
    ),
    "attention mask type": (
        F.scaled_dot_product_attention,
        (HEADS, HEADS, HEADS, rand(7, 7).long()),
        {},
        ("attn_mask", "bool or float", "long"),
    ),
    "attention masks": (
        F.scaled_dot_product_attention,
        (HEADS, HEADS, HEADS, rand(7, 7)),
        {"is_causal": True},
        ("attn_mask", "is_causal=True"),
    ),
    "attention dropout": (
        F.scaled_dot_product_attention,
        (HEADS, HEADS, HEADS),
        {"dropout_p": 2.0},
        ("dropout probability", "between 0 and 1", "2"),
    ),
    "lstm_cell states": (F.lstm_cell, (ROWS, [STATE], INPUT_GATES, STATE_GATES), {}, ("two", "got 1")),
    "lstm_cell state": (
        F.lstm_cell,
        (ROWS, [rand(2, 5), STATE], INPUT_GATES, STATE_GATES),
        {},
        ("hidden0", "got 5", "expected 4"),
    ),
    "lstm_cell input": (
        F.lstm_cell,
        (ROWS, [STATE, STATE], rand(16, 5), STATE_GATES),
        {},
        ("input_size", "got 3", "expected 5"),
    ),
    "lstm_cell bias": (
        F.lstm_cell,
        (ROWS, [STATE, STATE], INPUT_GATES, STATE_GATES, rand(15), rand(15)),
        {},
        ("b_ih", "[15]", "[16]"),
    ),
    "lstm arguments": (F.lstm, (SEQUENCE, [STATES, STATES]), {}, ("9", "got 2", "batch_first", "batch_sizes")),
    "lstm type": (F.lstm, (SEQUENCE.long(), [STATES, STATES], LAYER, *OPTIONS, False), {}, ("Long", "float32")),
    "lstm dimensions": (
        F.lstm,
        (ROWS, [STATES, STATES], LAYER, *OPTIONS, False),
        {},
        ("input must have 3 dimensions", "[2, 3]"),
    ),
    "lstm input": (
        F.lstm,
        (rand(5, 2, 4), [STATES, STATES], LAYER, *OPTIONS, False),
        {},
        ("input_size", "Expected 3", "got 4"),
    ),
    "lstm empty": (
        F.lstm,
        (SEQUENCE[:0], [STATES, STATES], LAYER, *OPTIONS, False),
        {},
        ("sequence length to be larger than 0", "[0, 2, 3]"),
    ),
    "lstm states": (F.lstm, (SEQUENCE, [STATES], LAYER, *OPTIONS, False), {}, ("two hidden states", "got 1")),
    "lstm state": (
        F.lstm,
        (SEQUENCE, [rand(2, 2, 4), STATES], LAYER, *OPTIONS, False),
        {},
        ("hidden[0]", "(1, batch, features)", "[2, 2, 4]"),
    ),
    "lstm parameters": (
        F.lstm,
        (SEQUENCE, [STATES, STATES], LAYER[:3], *OPTIONS, False),
        {},
        ("parameters: 3", "expected 4"),
    ),
    "lstm layers": (
        F.lstm,
        (SEQUENCE, [STATES, STATES], LAYER, True, 0, 0.0, False, False, False),
        {},
        ("num_layers must be at least 1", "got 0"),
    ),
    "lstm batch_sizes": (
        F.lstm,
        (rand(5, 3), torch.tensor([2, 2]), [STATES, STATES], LAYER, *OPTIONS),
        {},
        ("batch_sizes", "4", "5 rows"),
    ),
    "drop_connect": (nn.DropConnectLinear, (3, 4), {"p": 2.0}, ("p must be between 0 and 1", "got 2")),
    "maxout": (nn.Maxout, (3, 4, 0), {}, ("pieces must be positive", "got 0")),
    "stochastic_depth": (nn.StochasticDepth, (-0.5, "row"), {}, ("p must be between 0 and 1", "got -0.5")),
    "stochastic_depth mode": (nn.StochasticDepth, (0.5, "column"), {}, ("mode", "'batch' or 'row'", "'column'")),
    "positions": (nn.LearnedPositions(4, 3), (SEQUENCE.transpose(0, 1),), {}, ("at most 4 positions", "got 5")),
}


@pytest.mark.parametrize("name", MISUSES)
def test_a_message_says_what_was_got_and_what_was_expected(name: str) -> None:
    function, arguments, options, words = MISUSES[name]
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)) as caught:
        function(*arguments, **options)
    operation = [name for name in F.__all__ if getattr(F, name) is function]  # none for modules
    assert [word for word in [*operation, *words] if word not in str(caught.value)] == [], str(caught.value)


def test_every_function_has_misuses() -> None:
    tried = {function for function, *_ in MISUSES.values()}
    assert {getattr(F, name) for name in F.__all__} <= tried
