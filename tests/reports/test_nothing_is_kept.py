"""fuse, convert, report and revert keep no object of the models that they have had."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch

import dlkernels


def network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(36, 3)
    ).eval()


def converted(model: torch.nn.Module) -> None:
    dlkernels.report(dlkernels.convert(model))
    dlkernels.revert(model)


@pytest.mark.parametrize("call", [dlkernels.fuse, converted], ids=["fuse", "convert"])
def test_no_object_outlives_a_call(call: Callable[[torch.nn.Module], object]) -> None:
    model = network()

    def objects_after(calls: int) -> int:
        for _ in range(calls):
            call(copy.deepcopy(model))
        gc.collect()
        return len(gc.get_objects())

    objects_after(5)  # torch's own caches
    before = objects_after(5)
    assert objects_after(20) <= before + 2  # the objects of the counts themselves
    gone = copy.deepcopy(model)
    watch = weakref.ref(gone)
    call(gone)
    del gone
    gc.collect()
    assert watch() is None
