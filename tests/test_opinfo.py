"""torch's own test database of operators: every sample and every error input, held against the functions here."""

from __future__ import annotations

import re

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

from .cases import OpInfoEntry, opinfo_entries, outputs_of

OPERATORS = {f"{op.name}{'.' + op.variant_test_name if op.variant_test_name else ''}": op for op in op_db}

entries = pytest.mark.parametrize("entry", opinfo_entries(), ids=str)


@entries
def test_every_sample_gives_what_torch_gives(entry: OpInfoEntry, dtype: torch.dtype) -> None:
    op = OPERATORS[entry.torch_name]
    if not op.supports_dtype(dtype, "cpu"):
        pytest.skip(f"torch's {entry.torch_name} has no {dtype} samples on CPU")
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    for number, sample in enumerate(samples):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            expected = outputs_of(op(sample.input, *sample.args, **sample.kwargs))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            actual = outputs_of(entry.function(sample.input, *sample.args, **sample.kwargs))
        message = f"sample {number}: {sample.summary()}"
        torch.testing.assert_close(actual, expected, equal_nan=True, msg=lambda text, m=message: f"{m}\n{text}")
        leaves = [t for t in outputs_of([sample.input, sample.args, sample.kwargs]) if t.requires_grad]
        if not leaves or not any(o.requires_grad for o in expected):
            continue
        grads = [
            torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)
            for outputs in (actual, expected)
        ]
        torch.testing.assert_close(*grads, equal_nan=True, msg=lambda text, m=message: f"{m}, gradients\n{text}")


@entries
def test_every_error_input_raises_what_torch_raises(entry: OpInfoEntry) -> None:
    op = OPERATORS[entry.torch_name]
    if op.error_inputs_func is None:
        pytest.skip(f"torch lists no error inputs for {entry.torch_name}")
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type) as raised:
            entry.function(sample.input, *sample.args, **sample.kwargs)
        assert re.search(error.error_regex, str(raised.value)), sample.summary()
