"""torch's own test database of operators: every sample and every error input, held against the functions here."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("expecttest")  # which torch's database imports

from torch.testing._internal.common_device_type import toleranceOverride
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo

from .cases import OpInfoEntry, opinfo_entries, outputs_of

OPERATORS = {f"{op.name}{'.' + op.variant_test_name if op.variant_test_name else ''}": op for op in op_db}


def is_inexact(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16, torch.float32)


entries = pytest.mark.parametrize("entry", opinfo_entries(), ids=str)


def tolerances(op: OpInfo, dtype: torch.dtype) -> dict[str, float]:
    """What torch's own tests allow this operator: nothing said means the usual tolerances of the type.

    Half types are computed in float32, so what is allowed there in absolute terms is allowed to them.
    """
    usual = {torch.bfloat16: 1.6e-2, torch.float16: 1e-3}
    for info in op.decorators:
        for decorator in info.decorators:
            if isinstance(decorator, toleranceOverride) and info.test_name is None:
                if dtype in decorator.d:
                    return {"rtol": decorator.d[dtype].rtol, "atol": decorator.d[dtype].atol}
                if dtype in usual and torch.float32 in decorator.d:
                    return {"rtol": usual[dtype], "atol": decorator.d[torch.float32].atol}
    return {}


@entries
def test_every_sample_gives_what_torch_gives(entry: OpInfoEntry, dtype: torch.dtype) -> None:
    op = OPERATORS[entry.torch_name]
    if not op.supports_dtype(dtype, "cpu"):
        pytest.skip(f"torch's {entry.torch_name} has no {dtype} samples on CPU")
    allowed = tolerances(op, dtype)
    torch.manual_seed(0)
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    for number, sample in enumerate(samples):
        # Held to the float64 result: torch's own, in fewer bits, may be further off than its tolerance.
        exact = sample.transform(lambda t: t.detach().double().requires_grad_(t.requires_grad) if is_inexact(t) else t)
        if "options" in exact.kwargs and is_inexact(sample.input):
            exact.kwargs["options"] = None  # torch cuts logits into chunks in half types only
        results = []
        for function, s in ((entry.function, sample), (op, exact)):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                outputs = outputs_of(function(s.input, *s.args, **s.kwargs))
            leaves = [t for t in outputs_of([s.input, s.args, s.kwargs]) if t.requires_grad]
            chosen = [o for o in outputs if o.requires_grad]
            ones = [torch.ones_like(o) for o in chosen]
            grads = torch.autograd.grad(chosen, leaves, ones, allow_unused=True) if leaves and chosen else ()
            results.append([t if t is None else t.detach().to(dtype) for t in (*outputs, *grads)])
        message = f"sample {number}: {sample.summary()}"
        if entry.is_random(sample):
            actual, expected = ([(t.shape, t.dtype) for t in result] for result in results)
            assert actual == expected, message
            continue
        for actual, expected in zip(*results, strict=True):
            if entry.rounds_factors and dtype == torch.bfloat16 and expected.numel() > 0:
                allowed["atol"] = torch.finfo(dtype).eps / 2 * float(expected.abs().max())
            torch.testing.assert_close(
                actual, expected, equal_nan=True, msg=lambda text, m=message: f"{m}\n{text}", **allowed
            )


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
