"""Measures what ``dlkernels.override()`` takes for a call, in microseconds, on tensors so small that it shows.

A call of torch's function inside is compared with one of ours directly. Beside it stands what a mode that does nothing
adds to the same function of torch: that much is torch's own way to ask a mode, which goes twice through the functions
of torch.nn.functional that are written in Python. Samples are taken in turns; the smallest of each counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as torch_functional

import dlkernels
from dlkernels import functional

CALLS, ROUNDS = 2000, 15
Call = Callable[[Any], object]


class Nothing(torch.overrides.TorchFunctionMode):
    """A mode that lets everything pass."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


def calls() -> dict[str, Call]:
    """A small call of each operation, from the module that has its function."""
    image, kernel, channels = torch.randn(1, 2, 3, 3), torch.randn(2, 2, 1, 1), torch.ones(2)
    logits, labels, heads = torch.randn(2, 4), torch.tensor([0, 1]), torch.randn(1, 1, 2, 4)
    return {
        "conv2d": lambda module: module.conv2d(image, kernel),
        "batch_norm": lambda module: module.batch_norm(image, channels, channels),
        "linear": lambda module: module.linear(logits, logits),
        "cross_entropy": lambda module: module.cross_entropy(logits, labels),
        "scaled_dot_product_attention": lambda module: module.scaled_dot_product_attention(heads, heads, heads),
    }


def microseconds(call: Call, module: Any) -> float:
    """Mean over many calls in a row."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call(module)
    return 1e6 * (time.perf_counter() - start) / CALLS


def measure(call: Call) -> dict[str, float]:
    """The least of each kind over the rounds."""
    least: dict[str, float] = {}

    def sample(name: str, module: Any) -> None:
        least[name] = min(microseconds(call, module), least.get(name, float("inf")))

    for _ in range(ROUNDS):
        sample("ours", functional)
        sample("torch's", torch_functional)
        with dlkernels.override():
            sample("under override", torch_functional)
        with Nothing():
            sample("torch's in an empty mode", torch_functional)
    return least


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    table = Table(title="Microseconds a call")
    columns = ("ours", "under override", "override adds", "torch's", "torch's in an empty mode", "which adds", "rest")
    table.add_column("function")
    for column in columns:
        table.add_column(column, justify="right")
    with torch.no_grad():
        for name, call in calls().items():
            found = measure(call)
            found["override adds"] = found["under override"] - found["ours"]
            found["which adds"] = found["torch's in an empty mode"] - found["torch's"]
            found["rest"] = found["override adds"] - found["which adds"]
            table.add_row(name, *(f"{found[column]:.2f}" for column in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
