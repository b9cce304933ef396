"""Where a program's time goes: each operation's share, and whether torch or dlkernels ran it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# torch's operators by operation. Ours need no list: their names hold the operation's. What one of them calls in turn
# belongs to it. torch's cross-entropy has no backward operator of its own, but those of its two halves.
ATEN = {
    "conv2d": ("conv2d", "convolution", "convolution_backward"),
    "batch_norm": ("batch_norm", "native_batch_norm_backward"),
    "lstm": ("lstm", "lstm_cell", "mkldnn_rnn_layer_backward"),
    "linear": ("linear", "mm"),
    "cross_entropy": ("cross_entropy_loss", "nll_loss_backward", "_log_softmax_backward_data"),
    "attention": ("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu_backward"),
}
EVERYTHING_ELSE = "everything else"


@dataclass
class OperationTime:
    """Time of one operation, forward and backward together."""

    name: str
    seconds: float = 0.0
    calls: int = 0
    on_dlkernels: int = 0  # of these calls


def operation_times(program: Callable[[], object], operations: tuple[str, ...] = tuple(ATEN)) -> list[OperationTime]:
    """Runs ``program`` once under torch's profiler; returns the operations it used, and the rest of its time.

    The profiler costs about a microsecond an operator, which counts as everything else.
    """
    aten = {f"aten::{name}": operation for operation in operations for name in ATEN[operation]}

    def operation_of(operator: str) -> str | None:
        if operator.startswith("dlkernels::"):
            named = [operation for operation in operations if operation in operator]
            return max(named, key=len, default=None)  # the linear in linear_cross_entropy is no linear
        return aten.get(operator)

    times = {name: OperationTime(name) for name in operations}
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else the profiler reports its own start and stop on standard error
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        program()
        total = time.perf_counter() - start

    def visit(event: Any) -> None:
        operation = operation_of(event.name)
        if operation is None:
            for child in event.cpu_children:
                visit(child)
            return
        entry = times[operation]
        entry.seconds += 1e-6 * event.cpu_time_total
        entry.calls += 1
        entry.on_dlkernels += event.name.startswith("dlkernels::")

    for event in profile.events() or []:
        if event.cpu_parent is None:
            visit(event)
    used = [entry for entry in times.values() if entry.calls > 0]
    rest = OperationTime(EVERYTHING_ELSE, max(0.0, total - sum(entry.seconds for entry in used)))
    return [*used, rest]
