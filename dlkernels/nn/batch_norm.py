"""Batch normalisation modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import functional

if TYPE_CHECKING:
    _Base = torch.nn.modules.batchnorm._BatchNorm
else:
    _Base = object


class _KernelForward(_Base):
    """The forward pass of ``torch.nn``'s batch norms on :func:`dlkernels.functional.batch_norm`, and nothing else."""

    def forward(self, input: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        """Normalises ``input`` ``[N, C, ...]`` and, when training, moves the running statistics.

        ``residual`` is added and ``activation`` (``"relu"`` or ``"relu6"``) applied in the same kernel.
        """
        self._check_input_dim(input)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                factor = 1.0 / float(self.num_batches_tracked)
        use_batch_statistics = self.training or (self.running_mean is None and self.running_var is None)
        moves_statistics = not self.training or self.track_running_stats
        return functional.batch_norm(
            input,
            self.running_mean if moves_statistics else None,
            self.running_var if moves_statistics else None,
            self.weight,
            self.bias,
            use_batch_statistics,
            factor,
            self.eps,
            activation=activation,
            residual=residual,
        )


class BatchNorm1d(_KernelForward, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` on our kernels, for ``[N, C]`` and ``[N, C, L]``.

    Examples:
        >>> output = BatchNorm1d(8)(5 + 3 * torch.randn(16, 8))
        >>> torch.allclose(output.mean(0), torch.zeros(8), atol=1e-5)
        True
    """


class BatchNorm2d(_KernelForward, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` on our kernels, for ``[N, C, H, W]``.

    Examples:
        >>> output = BatchNorm2d(8)(5 + 3 * torch.randn(16, 8, 4, 4))
        >>> torch.allclose(output.mean((0, 2, 3)), torch.zeros(8), atol=1e-5)
        True
    """


class BatchNorm3d(_KernelForward, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` on our kernels, for ``[N, C, D, H, W]``.

    Examples:
        >>> output = BatchNorm3d(8)(5 + 3 * torch.randn(16, 8, 2, 4, 4))
        >>> torch.allclose(output.mean((0, 2, 3, 4)), torch.zeros(8), atol=1e-5)
        True
    """
