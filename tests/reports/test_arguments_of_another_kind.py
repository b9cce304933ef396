"""Arguments of a kind that has no meaning: a TypeError that names the operation and the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dlkernels import functional as F

NO_TENSORS = [1, 1.5, "x", [1, 2], {}, object(), b"a"]
NO_VALUES = torch.empty(0)


def kind(value: Any) -> str:
    """What a value is called in a test's name, the same in every process."""
    return type(value).__name__


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


WEIGHTS = [normal(16, 3), normal(16, 4), normal(16), normal(16)]
STATE = (normal(1, 2, 4), normal(1, 2, 4))
DENSE = {
    "input": normal(5, 2, 3),
    "hx": STATE,
    "params": WEIGHTS,
    "has_biases": True,
    "num_layers": 1,
    "dropout": 0.0,
    "train": False,
    "bidirectional": False,
    "batch_first": False,
}
PACKED = {"data": normal(5, 3), "batch_sizes": torch.tensor([2, 2, 1]), **DENSE}
del PACKED["input"], PACKED["batch_first"]


def refuses(message: str, function: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(TypeError, match=message):
        function(*args, **kwargs)


@pytest.mark.parametrize("value", NO_TENSORS, ids=kind)
@pytest.mark.parametrize("positions", [(), (2,)])
@pytest.mark.parametrize("name", ["input", "linear_weight", "target"])
def test_a_layer_of_a_loss(name: str, positions: tuple[int, ...], value: Any) -> None:
    target = torch.zeros(4, *positions, dtype=torch.long)
    arguments = {"input": normal(4, 6), "linear_weight": normal(5, *positions, 6), "target": target}
    refuses(f"linear_cross_entropy: {name} must be a Tensor", F.linear_cross_entropy, **{**arguments, name: value})


@pytest.mark.parametrize("name", ["linear_bias", "weight"])
def test_parameters_of_a_loss_of_several_positions(name: str) -> None:
    call = (normal(4, 6), normal(5, 2, 6), torch.zeros(4, 2, dtype=torch.long))
    refuses(f"linear_cross_entropy: {name} must be a Tensor", F.linear_cross_entropy, *call, **{name: 1})


@pytest.mark.parametrize("value", NO_TENSORS, ids=kind)
@pytest.mark.parametrize("name", ["input", "hx", "params"])
def test_tensors_of_an_lstm(name: str, value: Any) -> None:
    refuses(rf"lstm: {name}(\[0\])? must be a", F.lstm, *{**DENSE, name: value}.values())


@pytest.mark.parametrize("value", [1.5, "x", None, True, [1]], ids=kind)
def test_a_number_of_layers(value: Any) -> None:
    refuses("lstm: num_layers must be an int", F.lstm, *{**DENSE, "num_layers": value}.values())
    refuses("lstm: num_layers must be an int", F.lstm, *{**PACKED, "num_layers": value}.values())


@pytest.mark.parametrize("name", ["has_biases", "train", "bidirectional", "batch_first"])
def test_flags_of_an_lstm(name: str) -> None:
    refuses(f"lstm: {name} must be a bool", F.lstm, *{**DENSE, name: NO_VALUES}.values())


@pytest.mark.parametrize("value", [1, "x", None, object()], ids=kind)
def test_states_of_a_cell(value: Any) -> None:
    refuses("lstm_cell: hx must be a sequence of Tensors", F.lstm_cell, normal(2, 3), value, *WEIGHTS)


def test_the_flag_of_a_norm() -> None:
    call = (normal(4, 3), torch.zeros(3), torch.ones(3))
    refuses("batch_norm: training must be a bool", F.batch_norm, *call, training=NO_VALUES)
    assert F.batch_norm(*call, training=0).shape == (4, 3)


# A call of every function that hands its arguments to C++ as they come.
CALLS: dict[Any, dict[str, Any]] = {
    F.conv2d: {"input": normal(1, 2, 5, 5), "weight": normal(4, 2, 3, 3), "bias": normal(4)},
    F.linear: {"input": normal(2, 3), "weight": normal(4, 3), "bias": normal(4)},
    F.batch_norm: {"input": normal(4, 3), "running_mean": normal(3), "running_var": normal(3), "weight": normal(3)},
    F.cross_entropy: {"input": normal(4, 3), "target": torch.zeros(4, dtype=torch.long), "weight": normal(3)},
    F.scaled_dot_product_attention: {"query": normal(2, 4), "key": normal(3, 4), "value": normal(3, 4)},
    F.lstm_cell: {"input": normal(2, 3), "hx": (normal(2, 4), normal(2, 4)), "w_ih": WEIGHTS[0], "w_hh": WEIGHTS[1]},
}


@pytest.mark.parametrize("value", NO_TENSORS, ids=kind)
@pytest.mark.parametrize(
    ("function", "name"), [(f, name) for f, given in CALLS.items() for name in given if name != "hx"]
)
def test_a_tensor_of_another_kind(function: Any, name: str, value: Any) -> None:
    refuses(f": {name} must be a Tensor.*, got {type(value).__name__}", function, **{**CALLS[function], name: value})


INTS = [(F.conv2d, name) for name in ("stride", "padding", "dilation", "groups")] + [(F.cross_entropy, "ignore_index")]


@pytest.mark.parametrize("value", [1.0, True, np.float32(0.5), 2**70, None, object(), torch.tensor(1.5)], ids=kind)
@pytest.mark.parametrize(("function", "name"), INTS)
def test_an_int_of_another_kind(function: Any, name: str, value: Any) -> None:
    got = str(value) if type(value) is int else type(value).__name__
    refuses(f": {name} must be an int of 64 bits.*, got {got}", function, **{**CALLS[function], name: value})


@pytest.mark.parametrize("value", [np.int64(1), torch.tensor(1)], ids=kind)
def test_what_counts_as_an_int(value: Any) -> None:
    call = CALLS[F.conv2d]
    expected = F.conv2d(**call, stride=1, padding=1)
    torch.testing.assert_close(F.conv2d(**call, stride=value, padding=(value, 1), groups=value), expected)


FLOATS = [(F.batch_norm, "eps"), (F.batch_norm, "momentum"), (F.cross_entropy, "label_smoothing")]
FLOATS += [(F.scaled_dot_product_attention, "dropout_p"), (F.scaled_dot_product_attention, "scale")]


@pytest.mark.parametrize("value", ["1", [1.0], object()], ids=kind)
@pytest.mark.parametrize(("function", "name"), FLOATS)
def test_a_float_of_another_kind(function: Any, name: str, value: Any) -> None:
    refuses(f": {name} must be a float", function, **{**CALLS[function], name: value})


def test_the_message_is_one_line() -> None:
    with pytest.raises(TypeError) as caught:
        F.conv2d(normal(1, 2, 5, 5), normal(4, 2, 3, 3), stride="1")
    assert str(caught.value) == "conv2d: stride must be an int of 64 bits or a sequence of them, got str"
