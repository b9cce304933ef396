"""A trace of an LSTM over packed sequences serves batches of other sizes and lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dlkernels import nn


class Encoder(torch.nn.Module):
    def __init__(self, lstm: torch.nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, steps: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(steps, lengths, enforce_sorted=False)
        output, (h_n, _) = self.lstm(packed)
        return pad_packed_sequence(output)[0], h_n


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}], ids=str)
def test_a_trace_serves_other_batches(options: dict[str, int]) -> None:
    encoder = Encoder(nn.LSTM(3, 4, **options)).eval()
    with torch.no_grad():
        traced = torch.jit.trace(encoder, (torch.randn(5, 2, 3), torch.tensor([5, 3])), check_trace=False)
        for lengths in ([4], [6, 2, 3, 6], [1, 2, 3]):
            steps = torch.randn(max(lengths), len(lengths), 3)
            expected = encoder(steps, torch.tensor(lengths))
            torch.testing.assert_close(traced(steps, torch.tensor(lengths)), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_trace_of_padded_sequences_serves_other_batches(batch_first: bool) -> None:
    lstm = nn.LSTM(3, 4, num_layers=2, batch_first=batch_first).eval()
    with torch.no_grad():
        traced = torch.jit.trace(lstm, (torch.randn(5, 2, 3),), check_trace=False)
        steps = torch.randn(7, 4, 3)
        torch.testing.assert_close(traced(steps), lstm(steps))
