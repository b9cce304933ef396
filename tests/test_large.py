"""More elements than 32 bits count, through expanded arguments that are read where they lie."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlkernels import functional as F

from .cases import COLUMNS

MANY = 2**31


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def attention() -> None:
    batches = MANY // 256 + 1
    query, key = (normal(2, 1, 1, 256)[i : i + 1].expand(batches, 1, 1, 256) for i in range(2))
    value = normal(batches, 1, 1, 1)
    assert query.numel() > MANY
    assert torch.equal(F.scaled_dot_product_attention(query, key, value), value)  # one key: weight one


def batch_norm() -> None:
    image = normal(1, 2, 512, dtype=torch.bfloat16)
    images = image.expand(MANY // 1024 + 1, -1, -1)
    assert images.numel() > MANY
    output = F.batch_norm(images, None, None, training=True)
    one = F.batch_norm(image, None, None, training=True)
    for n in (0, 1, len(images) // 2, len(images) - 1):
        assert torch.equal(output[n], one[0])


def conv2d() -> None:
    count = 2**15 + 1
    image, weight = normal(1, 2, 256, 256), normal(3, 2, 2, 2).requires_grad_()
    images = image.expand(count, -1, -1, -1)
    assert images.numel() > 2 * MANY
    output, one = F.conv2d(images, weight, stride=120), F.conv2d(image, weight, stride=120)
    for n in (0, 1, count // 2, count - 1):
        assert torch.equal(output[n], one[0])
    (grad,) = torch.autograd.grad(output, weight, torch.ones(()).expand_as(output))
    (one_grad,) = torch.autograd.grad(one, weight, torch.ones_like(one))
    torch.testing.assert_close(grad, count * one_grad, rtol=1e-4, atol=1e-2 * float(one_grad.abs().max()))


def cross_entropy() -> None:
    rows, classes = 2048, 2**20 + 1
    row = normal(classes)
    target = torch.full((rows,), classes - 1)
    target[1] = 0
    losses = F.cross_entropy(row.expand(rows, classes), target, reduction="none")
    expected = torch.nn.functional.cross_entropy(row.double().expand(2, classes), target[:2], reduction="none")
    assert torch.equal(losses[2:], losses[:1].expand(rows - 2))
    torch.testing.assert_close(losses[:2], expected.float())


def linear() -> None:
    row, weight = normal(1, 2048), normal(2, 2048)
    rows = row.expand(2**20 + 1, -1)
    assert rows.numel() > MANY
    output = F.linear(rows, weight)
    assert torch.equal(output, output[:1].expand_as(output))
    torch.testing.assert_close(output[:1].double(), row.double() @ weight.double().T, rtol=1e-5, atol=1e-4)


def linear_cross_entropy() -> None:
    classes, features = 2**20 + 1, 2048
    hidden = normal(3, features)
    weight = (normal(1, features) / features).expand(classes, features)  # equal logits: every class as likely
    assert weight.numel() > MANY
    losses = F.linear_cross_entropy(hidden, weight, torch.tensor([0, classes // 2, classes - 1]), reduction="none")
    torch.testing.assert_close(losses, torch.tensor(float(classes)).log().expand(3))


def lstm() -> None:
    batch, features, hidden = 2**20 + 1, 2048, 1
    row = normal(1, features)
    weights = normal(4 * hidden, features) / 45, normal(4 * hidden, hidden)
    state = torch.zeros(1, hidden)
    inputs, states = row.expand(1, batch, features), state.expand(1, batch, hidden)
    assert inputs.numel() > MANY
    output, _, _ = F.lstm(inputs, (states, states), weights, False, 1, 0.0, False, False, False)
    expected, _ = F.lstm_cell(row.double(), (state.double(), state.double()), *(w.double() for w in weights))
    assert torch.equal(output, output[:, :1].expand_as(output))
    torch.testing.assert_close(output[0, :1], expected.float())


CHECKS: dict[str, Callable[[], None]] = {
    "attention": attention,
    "batch_norm": batch_norm,
    "conv2d": conv2d,
    "cross_entropy": cross_entropy,
    "linear": linear,
    "linear_cross_entropy": linear_cross_entropy,
    "lstm": lstm,
}


def test_every_column_is_here() -> None:
    assert set(CHECKS) == set(COLUMNS)


# Batch norm's output is as large as its input: about 9 GB and ten seconds.
COLUMN_PARAMETERS = [pytest.param(c, marks=pytest.mark.slow if c == "batch_norm" else ()) for c in CHECKS]


@pytest.mark.parametrize("column", COLUMN_PARAMETERS)
def test_more_elements_than_32_bits_count(column: str) -> None:
    if column == "batch_norm" and os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 12 * 2**30:
        pytest.skip("needs 12 GB of memory")
    with torch.enable_grad() if column == "conv2d" else torch.no_grad():
        CHECKS[column]()
