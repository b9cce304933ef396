"""torchvision, whose networks ours are compared with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch


def import_torchvision() -> ModuleType:
    """torchvision, or skips the test that asks.

    Its compiled operators load beside no other torch than the one that they were built for. Networks need none of them,
    but importing torchvision registers fake kernels for two, which must then exist by name.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        pytest.skip("torchvision is not installed: pip install --no-deps torchvision==0.28.0")
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        for name in ("torchvision::nms", "torchvision::qnms"):
            if not torch._C._dispatch_has_kernel(name):
                torch.library.define(name, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    return torchvision
