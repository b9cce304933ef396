"""An LSTM whose input has no features: only the state and the biases are left."""

from __future__ import annotations

import pytest
import torch

from dlkernels import functional as F

STEPS, BATCH, HIDDEN = 7, 17, 65


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_it_equals_one_whose_input_is_zero(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    parameters = [torch.randn(4 * HIDDEN, size, generator=generator) / 8 for size in (1, HIDDEN)]
    parameters += [torch.randn(4 * HIDDEN, generator=generator) for _ in range(2)]
    w_ih, w_hh, b_ih, b_hh = (parameter.to(dtype) for parameter in parameters)
    state = [torch.randn(1, BATCH, HIDDEN, generator=generator).to(dtype) for _ in range(2)]
    results = []
    for features in (0, 1):
        x = torch.zeros(STEPS, BATCH, features, dtype=dtype)
        weights = [w_ih[:, :features].contiguous(), w_hh, b_ih, b_hh]
        leaves = [t.detach().clone().requires_grad_() for t in (*state, *weights[1:])]
        h0, c0, *rest = leaves
        outputs = F.lstm(x, (h0, c0), [weights[0], *rest], True, 1, 0.0, False, False, False)
        loss = sum(output.float().square().sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for without, zero in zip(*results, strict=True):
        torch.testing.assert_close(without, zero)
