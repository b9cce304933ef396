"""Running out of memory is an exception like any other, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlkernels import functional as F

from .cases import COLUMNS, Case, call, primary_cases

HUGE = 2**42  # rows that no machine has memory for; a stride of 0 makes them cost nothing to ask for


def huge(*row: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(1, *row, dtype=dtype).expand(HUGE, *row)


CALLS: dict[str, Callable[[], object]] = {
    "attention": lambda: F.scaled_dot_product_attention(*(huge(2, 4, 8) for _ in range(3))),
    "batch_norm": lambda: F.batch_norm(huge(3, 4, 4), None, None, training=True),
    "conv2d": lambda: F.conv2d(huge(3, 8, 8), torch.zeros(4, 3, 3, 3)),
    "cross_entropy": lambda: F.cross_entropy(huge(5), huge(dtype=torch.long), reduction="none"),
    "linear": lambda: F.linear(huge(8), torch.zeros(5, 8)),
    "linear_cross_entropy": lambda: F.linear_cross_entropy(huge(8), torch.zeros(5, 8), huge(dtype=torch.long)),
    "lstm": lambda: F.lstm_cell(huge(4), (huge(3), huge(3)), torch.zeros(12, 4), torch.zeros(12, 3)),
}


def test_every_column_is_here() -> None:
    assert set(CALLS) == set(COLUMNS)


@pytest.mark.parametrize("case", primary_cases(), ids=str)
def test_a_failed_allocation_raises_and_the_next_call_is_right(case: Case) -> None:
    sample = case.build(torch.float32)
    expected = call(case.function, sample)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        CALLS[case.column]()
    for actual, wanted in zip(call(case.function, sample), expected, strict=True):
        assert torch.equal(actual, wanted)
