"""Where a program's time goes: each operation's share, and whether torch or dlkernels ran it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Operators by operation, ours and torch's; the names of backward operators among them. What one of them calls in turn
# belongs to it. torch's cross-entropy has no backward operator of its own, but those of its two halves.
OPERATORS = {
    "conv2d": ("conv2d", "convolution", "convolution_backward", "conv2d_backward"),
    "batch_norm": ("batch_norm", "native_batch_norm", "native_batch_norm_backward", "batch_norm_backward"),
    "lstm": ("lstm", "lstm_cell", "lstm_backward", "lstm_cell_backward", "mkldnn_rnn_layer_backward"),
    "cross_entropy": (
        "cross_entropy",
        "cross_entropy_backward",
        "linear_cross_entropy",
        "linear_cross_entropy_backward",
        "cross_entropy_loss",
        "nll_loss_backward",
        "_log_softmax_backward_data",
    ),
    "attention": (
        "attention",
        "attention_backward",
        "scaled_dot_product_attention",
        "scaled_dot_product_attention_backward",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
}
EVERYTHING_ELSE = "everything else"


@dataclass
class OperationTime:
    """Time of one operation, forward and backward together."""

    name: str
    seconds: float = 0.0
    calls: int = 0
    on_dlkernels: int = 0  # of these calls


def operation_times(
    program: Callable[[], object], operations: tuple[str, ...] = tuple(OPERATORS)
) -> list[OperationTime]:
    """Runs ``program`` once under torch's profiler; returns the operations it used, and the rest of its time.

    The profiler costs about a microsecond an operator, which counts as everything else.
    """
    owner = {
        f"{library}::{name}": key for key in operations for name in OPERATORS[key] for library in ("dlkernels", "aten")
    }
    times = {name: OperationTime(name) for name in operations}
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else the profiler reports its own start and stop on standard error
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        program()
        total = time.perf_counter() - start

    def visit(event: Any) -> None:
        if event.name not in owner:
            for child in event.cpu_children:
                visit(child)
            return
        entry = times[owner[event.name]]
        entry.seconds += 1e-6 * event.cpu_time_total
        entry.calls += 1
        entry.on_dlkernels += event.name.startswith("dlkernels::")

    for event in profile.events() or []:
        if event.cpu_parent is None:
            visit(event)
    used = [entry for entry in times.values() if entry.calls > 0]
    rest = OperationTime(EVERYTHING_ELSE, max(0.0, total - sum(entry.seconds for entry in used)))
    return [*used, rest]
