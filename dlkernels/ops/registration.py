"""What every operation shares: how ``torch.compile`` sees the functions of the extension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def traced_as(entry: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the operator-level spelling of ``entry``, a function of the extension.

    The extension's function is the fast way in for eager code, but opaque to ``torch.compile``; the decorated function
    says the same with ``torch.ops.dlkernels`` and is what gets traced in its place. Eager calls do not pass through it.
    """
    return torch.compiler.substitute_in_graph(entry, skip_signature_check=True)
