"""What is installed, what it was built for, and whether it computes correctly here."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _C, __version__, functional, nn


def processor_name() -> str:
    """The processor as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def build_facts() -> dict[str, Any]:
    """What the build recorded; empty where it recorded nothing."""
    try:
        from ._build_info import BUILD_INFO
    except ImportError:
        return {}
    return dict(BUILD_INFO)


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, size and driver of a GPU, in values that JSON can hold; nothing of a processor."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, instruction sets and threads, and the facts of ``device``, in values that JSON can hold."""
    return {
        "dlkernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _C.isa(),
        "available_isas": list(_C.available_isas()),
        "DLKERNELS_ISA": os.environ.get("DLKERNELS_ISA"),
        "build": build_facts(),
        **device_facts(device or torch.device("cpu")),
    }


@dataclass(frozen=True)
class Check:
    """Outcome of one operation's self-test."""

    name: str
    passed: bool
    error: float | None  # largest relative error (root mean square) of the output and the gradients
    bound: float
    seconds: float
    message: str = ""


Program = Callable[..., "Tensor | tuple[Tensor, ...]"]


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over that of the reference; NaN if either holds one."""
    difference = torch.linalg.vector_norm(result.double() - reference.double())
    return (difference / torch.linalg.vector_norm(reference.double()).clamp_min(1e-300)).item()


def check(name: str, ours: Program, reference: Program, inputs: dict[str, Tensor], bound: float) -> Check:
    """Runs ``ours`` in float32 and torch's ``reference`` in float64; compares outputs and all gradients."""
    start = time.perf_counter()

    def run(program: Program, dtype: torch.dtype) -> list[Tensor]:
        leaves = {
            key: value.to(dtype).requires_grad_() if value.is_floating_point() else value
            for key, value in inputs.items()
        }
        outputs = program(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # Weights that differ from element to element, so that no two gradients cancel.
        weights = [torch.linspace(0.5, 1.5, out.numel(), dtype=dtype).view(out.shape) for out in outputs]
        differentiable = [leaf for leaf in leaves.values() if leaf.requires_grad]
        return [*outputs, *torch.autograd.grad(outputs, differentiable, weights)]

    try:
        results, references = run(ours, torch.float32), run(reference, torch.float64)
        error = max(relative_error(a, b) for a, b in zip(results, references, strict=True))
    except Exception as failure:  # a self-test reports what it finds, whatever that is
        message = f"{type(failure).__name__}: {failure}".splitlines()[0]
        return Check(name, False, None, bound, time.perf_counter() - start, message)
    return Check(name, error <= bound, error, bound, time.perf_counter() - start)


def lstm_program(module: type[torch.nn.LSTM]) -> Program:
    """An LSTM of the given class as a function of its input and weights."""

    def program(sequence: Tensor, **weights: Tensor) -> Tensor:
        model = module(12, 20)
        return torch.func.functional_call(model.to(sequence.dtype), weights, (sequence,))[0]

    return program


def self_test() -> list[Check]:
    """Every operation, forward and backward in float32, against torch's in float64 on small inputs."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    torch_functional = torch.nn.functional
    image = {"input": random(2, 12, 15, 17), "weight": random(20, 12, 3, 3), "bias": random(20)}
    batch = {"input": random(8, 12, 9, 9), "weight": random(12), "bias": random(12)}
    logits = {"input": random(64, 37), "target": torch.randint(37, (64,), generator=generator)}
    sequence = {"sequence": random(9, 4, 12), "weight_ih_l0": random(80, 12), "weight_hh_l0": 0.2 * random(80, 20)}
    sequence |= {"bias_ih_l0": random(80), "bias_hh_l0": random(80)}
    heads = {"query": random(2, 3, 33, 16), "key": random(2, 3, 33, 16), "value": random(2, 3, 33, 16)}

    layer = {"input": random(40, 24), "linear_weight": random(51, 24), "linear_bias": random(51)}
    affine = {"input": random(40, 24), "weight": random(51, 24), "bias": random(51)}
    layer["target"] = torch.randint(51, (40,), generator=generator)

    def linear_loss(input: Tensor, linear_weight: Tensor, linear_bias: Tensor, target: Tensor) -> Tensor:
        logits = torch_functional.linear(input, linear_weight, linear_bias)
        return torch_functional.cross_entropy(logits, target)

    def fused_linear_loss(input: Tensor, linear_weight: Tensor, linear_bias: Tensor, target: Tensor) -> Tensor:
        return functional.linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias)

    def batch_norm(library: Any) -> Program:
        return lambda input, weight, bias: library.batch_norm(input, None, None, weight, bias, training=True)

    def attention(library: Any) -> Program:
        return lambda query, key, value: library.scaled_dot_product_attention(query, key, value, is_causal=True)

    # Each is several times what a correct float32 kernel shows here, and far below what a wrong one would.
    return [
        check("conv2d", functional.conv2d, torch_functional.conv2d, image, 2e-6),
        check("batch_norm", batch_norm(functional), batch_norm(torch_functional), batch, 5e-6),
        check("lstm", lstm_program(nn.LSTM), lstm_program(torch.nn.LSTM), sequence, 5e-6),
        check("linear", functional.linear, torch_functional.linear, affine, 2e-6),
        check("cross_entropy", functional.cross_entropy, torch_functional.cross_entropy, logits, 2e-6),
        check("linear_cross_entropy", fused_linear_loss, linear_loss, layer, 5e-6),
        check("attention", attention(functional), attention(torch_functional), heads, 5e-6),
    ]


def report() -> dict[str, Any]:
    """The environment and the outcome of the self-test."""
    checks = self_test()
    return environment() | {"self_test": [asdict(check) for check in checks], "ok": all(c.passed for c in checks)}
