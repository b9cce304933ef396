"""Long short-term memory as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import functional

State = tuple[Tensor, Tensor]


class LSTMCell(torch.nn.LSTMCell):
    """``torch.nn.LSTMCell`` computed by :func:`dlkernels.functional.lstm_cell`.

    Examples:
        >>> h, c = LSTMCell(8, 16)(torch.randn(4, 8))
        >>> h.shape, c.shape
        (torch.Size([4, 16]), torch.Size([4, 16]))
    """

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """Next hidden and cell state for ``input`` ``[N, input_size]`` or ``[input_size]``."""
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for index, state in enumerate(hx if hx is not None else ()):
            if state.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead")
        parameters = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if hx is None:
            zeros = input.new_zeros([*input.shape[:-1], self.hidden_size])
            hx = (zeros, zeros)
        if input.dim() == 2:
            return functional.lstm_cell(input, hx, *parameters)
        h, c = functional.lstm_cell(input.unsqueeze(0), (hx[0].unsqueeze(0), hx[1].unsqueeze(0)), *parameters)
        return h.squeeze(0), c.squeeze(0)


class LSTM(torch.nn.LSTM):
    """``torch.nn.LSTM`` computed by :func:`dlkernels.functional.lstm`.

    ``torch.compile`` traces no subclass of ``torch.nn.LSTM`` unless ``torch._dynamo.config.allow_rnn`` is set: it
    breaks the graph there and runs the module eagerly. With the setting, the module compiles whole.

    Examples:
        >>> output, (h, c) = LSTM(8, 16, num_layers=2, batch_first=True)(torch.randn(4, 5, 8))
        >>> output.shape, h.shape
        (torch.Size([4, 5, 16]), torch.Size([2, 4, 16]))
    """

    def forward(self, input: Any, hx: State | None = None) -> Any:  # type: ignore[override]
        """Outputs and last states for ``input`` ``[T, N, input_size]`` (``[N, T, input_size]`` with ``batch_first``),
        ``[T, input_size]``, or a ``PackedSequence``."""
        self._update_flat_weights()
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        batch_dimension = 0 if self.batch_first else 1
        if hx is not None and any(state.dim() != input.dim() for state in hx):
            rank = "batched 3-D" if batched else "unbatched 2-D"
            raise RuntimeError(
                f"For {rank} input, hx and cx should also be {input.dim()}-D but got "
                f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        if not batched:
            input = input.unsqueeze(batch_dimension)
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        if hx is None:
            hx = self._zero_state(input, input.shape[batch_dimension])
        self.check_forward_args(input, hx, None)
        output, h_n, c_n = functional.lstm(
            input,
            hx,
            self._parameters_in_order(),
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
        )
        if batched:
            return output, (h_n, c_n)
        return output.squeeze(batch_dimension), (h_n.squeeze(1), c_n.squeeze(1))

    def _forward_packed(self, input: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is None:
            # A trace would keep the number, and with it the size of the batch.
            hx = self._zero_state(data, batch_sizes[0] if torch.jit.is_tracing() else int(batch_sizes[0]))
        else:
            hx = self.permute_hidden(hx, sorted_indices)
        self.check_forward_args(data, hx, batch_sizes)
        output, h_n, c_n = functional.lstm(
            data,
            batch_sizes,
            hx,
            self._parameters_in_order(),
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
        )
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden((h_n, c_n), unsorted_indices)

    def _parameters_in_order(self) -> list[Tensor]:
        return [weight for weight in self._flat_weights if weight is not None]

    def _zero_state(self, like: Tensor, batch: Any) -> State:
        runs = self.num_layers * (2 if self.bidirectional else 1)
        h_0 = like.new_zeros([runs, batch, self.proj_size or self.hidden_size])
        return h_0, like.new_zeros([runs, batch, self.hidden_size]) if self.proj_size else h_0
