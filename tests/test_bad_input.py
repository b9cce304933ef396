"""Bad input that every operation refuses alike; what is particular to an operation is in its own tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from .cases import Case, Sample, all_cases, call

cases = pytest.mark.parametrize("case", all_cases(), ids=str)


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


@cases
def test_a_tensor_on_another_device_is_refused(case: Case) -> None:
    sample = case.build(torch.float32)
    if sum(isinstance(value, Tensor) for value in (*sample.args, *sample.kwargs.values())) < 2:
        pytest.skip("a single tensor cannot be on another device")
    for where, changed in with_one_changed(case, lambda t: t.to("meta"), lambda t: True):
        if where != "batch_sizes":  # on the CPU whatever the device of the others
            with pytest.raises(RuntimeError, match="same device"):
                call(case.function, changed)


@cases
def test_mixed_types_are_refused(case: Case) -> None:
    sample = case.build(torch.float32)
    floating = [v for v in (*sample.args, *sample.kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
    if len(floating) == 1:
        pytest.skip("a single floating-point tensor has the type that it has")
    for _, changed in with_one_changed(case, Tensor.double, Tensor.is_floating_point):
        with pytest.raises(RuntimeError, match="(?i)double"):
            call(case.function, changed)
