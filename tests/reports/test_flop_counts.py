"""FlopCounterMode counts our operators, forward and backward, as it counts torch's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dlkernels import functional as F
from dlkernels import nn

from ..cases import Case, Sample, all_cases


def flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[int, int]:
    """Counted forward, and backward through every output."""
    with FlopCounterMode(display=False) as forward:
        outputs = function(*args, **kwargs)
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((tensor.sum() for tensor in tensors), torch.zeros(()))
    with FlopCounterMode(display=False) as backward:
        total.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def of_case(case: Case, function: Callable[..., Any], chosen: list[int]) -> tuple[int, int]:
    sample: Sample = case.build(torch.float64)
    args = [a.detach().requires_grad_(i in chosen) if isinstance(a, Tensor) else a for i, a in enumerate(sample.args)]
    return flops(function, *args, **sample.kwargs)


COUNTED = [case for case in all_cases() if case.column != "attention"]


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_calls_count_what_torchs_count(case: Case) -> None:
    every = case.build(torch.float64).differentiable()
    # Of packed sequences that run backwards, how many begin in the first step is not in any shape.
    for chosen in (every, *(() if "packed" in case.name else (every[:1], every[1:]))):
        if chosen:
            assert of_case(case, case.function, chosen) == of_case(case, case.reference, chosen), chosen


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 5)),
        ((2, 6, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8)),  # shared heads
        ((1, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8)),  # a broadcast batch
    ],
)
def test_attention_counts_its_five_products_and_the_scores_again(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]
) -> None:
    tensors = [torch.randn(shape, requires_grad=True) for shape in (query, key, value)]
    shared = query[1] != key[1]
    found = flops(F.scaled_dot_product_attention, *tensors, enable_gqa=shared)
    whole = (key[0], *query[1:])
    grad = (*whole[:-1], value[-1])
    assert found == (sdpa_flop_count(whole, key, value), sdpa_backward_flop_count(grad, whole, key, value))


def test_attention_without_heads_counts() -> None:
    query, key, value = (torch.randn(n, 8, requires_grad=True) for n in (7, 9, 9))
    assert flops(F.scaled_dot_product_attention, query, key, value)[0] == 2 * 7 * 9 * (8 + 8)


def test_modules_are_told_apart() -> None:
    model = torch.nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(5, 4))
    counts = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    assert counts["Sequential.0"] == 2 * 5 * 4 * 8
    assert counts["Sequential.1"] == 2 * 5 * 8 * 2


BEFORE = "from torch.utils.flop_counter import FlopCounterMode\n"
COUNTS = """
import torch
from dlkernels import functional as F
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    F.linear(torch.ones(2, 3), torch.ones(4, 3))
assert counter.get_total_flops() == 48
"""


@pytest.mark.parametrize("before", ["", BEFORE], ids=["after dlkernels", "before dlkernels"])
def test_counts_whenever_the_counter_is_imported(before: str) -> None:
    done = subprocess.run([sys.executable, "-c", before + COUNTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_dlkernels_does_not_import_the_counter() -> None:
    program = "import sys, dlkernels; assert 'torch.utils.flop_counter' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
