"""Kind: bits that follow strides. Both memory formats of batch norm, and every layout of what second derivatives are
made of, give the same bits on the processor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlkernels import functional


def statistics(x: Tensor) -> list[Tensor]:
    return list(torch.ops.dlkernels.batch_norm(x, None, None, None, None, None, True, 1e-5, None)[1:])


@pytest.mark.parametrize(
    "shape", [(13, 2, 1, 5), (26, 2, 1, 5), (1, 2, 1, 130), (20, 11, 1, 12), (4, 11, 9, 7), (3, 5, 2, 3, 31)], ids=str
)
def test_batch_norm_of_several_chunks(processor_isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    channels_last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    for seed in range(8):
        torch.manual_seed(seed)
        x, cotangent = (torch.randn(shape).double() * 3 + 1).to(dtype), torch.randn(shape).to(dtype)
        weight, bias = torch.rand(shape[1], dtype=dtype), torch.randn(shape[1], dtype=dtype)
        results = []
        for memory_format in (torch.contiguous_format, channels_last):
            leaves = [x.to(memory_format=memory_format), weight, bias]
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            output = functional.batch_norm(leaves[0], None, None, *leaves[1:], training=True)
            results.append([*statistics(leaves[0]), output, *torch.autograd.grad(output, leaves, cotangent)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_second_derivatives_of_batch_norm(processor_isa: str) -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        x, cotangent, direction = (torch.randn(4, 33, 9, 7) for _ in range(3))
        weight, bias = torch.rand(33), torch.randn(33)
        results = []
        for memory_format in (torch.contiguous_format, torch.channels_last):
            leaves = [t.detach().requires_grad_() for t in (x.to(memory_format=memory_format), weight, bias)]
            gradient_of_output = cotangent.to(memory_format=memory_format).requires_grad_()
            output = functional.batch_norm(leaves[0], None, None, *leaves[1:], training=True)
            first = torch.autograd.grad(output, leaves, gradient_of_output, create_graph=True)
            total = [first[0], first[1]], [direction.to(memory_format=memory_format), weight]
            results.append(torch.autograd.grad(*total[:1], [*leaves[:2], gradient_of_output], total[1]))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_second_derivatives_of_cross_entropy(processor_isa: str) -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        x, direction, target = torch.randn(24, 65, 8), torch.randn(24, 65, 8), torch.randint(0, 65, (24, 8))
        cotangent = torch.randn(24, 8)
        results = []
        for order in ((0, 1, 2), (0, 2, 1), (2, 1, 0)):

            def laid(t: Tensor, order: tuple[int, ...] = order) -> Tensor:
                return t.permute(order).contiguous().permute([order.index(d) for d in range(3)])

            leaf, gradient = laid(x).requires_grad_(), cotangent.clone().requires_grad_()
            loss = functional.cross_entropy(leaf, target, reduction="none", label_smoothing=0.5)
            (first,) = torch.autograd.grad(loss, leaf, gradient, create_graph=True)
            results.append(torch.autograd.grad(first, (leaf, gradient), laid(direction)))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)
