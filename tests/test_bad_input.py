"""Bad input that every operation refuses alike; what is particular to an operation is in its own tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

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


@pytest.mark.parametrize("case", SEVERAL_FLOATING, ids=str)
def test_mixed_types_are_refused(case: Case) -> None:
    for _, changed in with_one_changed(case, Tensor.double, Tensor.is_floating_point):
        with pytest.raises(RuntimeError, match="(?i)double"):
            call(case.function, changed)
