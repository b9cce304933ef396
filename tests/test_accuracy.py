"""Every operation against torch's own, and both against torch in float64, on every instruction set and type."""

from __future__ import annotations

import pytest
import torch

from .cases import Case, all_cases, call, gradients, random_like

ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}


def error(values: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Root-mean-square error relative to the root-mean-square value, over all tensors of a result."""
    difference = sum(float((v.double() - e).detach().square().sum()) for v, e in zip(values, exact, strict=True))
    scale = sum(float(e.detach().square().sum()) for e in exact)
    return (difference / scale) ** 0.5 if scale else difference**0.5


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_values_and_gradients_match_torch(case: Case, dtype: torch.dtype, isa: str) -> None:
    sample = case.build(dtype)
    exact_sample = sample.to(torch.float64)
    ours, theirs, exact = (s.requiring_grad() for s in (sample, sample, exact_sample))
    our_outputs, their_outputs = call(case.function, ours), call(case.reference, theirs)
    exact_outputs = call(case.reference, exact)
    assert [o.shape for o in our_outputs] == [o.shape for o in their_outputs]
    assert [o.dtype for o in our_outputs] == [o.dtype for o in their_outputs]

    # No worse than torch in the same type, but for one rounding where torch happens to be exact.
    def check(ours: list[torch.Tensor], theirs: list[torch.Tensor], exact: list[torch.Tensor], what: str) -> None:
        if dtype == torch.float64:  # as exact as the oracle itself
            limit = 1e-14
        else:
            limit = 1.2 * error(theirs, exact) + 2 * ROUNDING[dtype]
        if dtype == torch.float32:
            limit = min(max(limit, case.float32_error), 2e-6)
        assert error(ours, exact) <= limit, what

    check(our_outputs, their_outputs, exact_outputs, "outputs")
    grads = random_like([o for o in exact_outputs if o.requires_grad])
    cast = [g.to(o.dtype) for g, o in zip(grads, (o for o in our_outputs if o.requires_grad), strict=True)]
    exact_grads = gradients(exact_outputs, exact, [g.double() for g in cast])
    our_grads, their_grads = gradients(our_outputs, ours, cast), gradients(their_outputs, theirs, cast)
    for position, triple in enumerate(zip(our_grads, their_grads, exact_grads, strict=True)):
        check(*([t] for t in triple), f"gradient {position}")


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_formulas_pass_gradcheck(case: Case) -> None:
    sample = case.build(torch.float64).requiring_grad()
    if sum(sample.args[i].numel() for i in sample.differentiable()) > 2000:
        pytest.skip("numeric differentiation of this many elements takes minutes; the smaller cases prove the formula")
    chosen = sample.differentiable()

    def function(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args = list(sample.args)
        for position, value in zip(chosen, inputs, strict=True):
            args[position] = value
        outputs = call(case.function, type(sample)(tuple(args), sample.kwargs))
        return tuple(o for o in outputs if o.requires_grad)

    inputs = [sample.args[i] for i in chosen]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("case", [c for c in all_cases() if c.integers], ids=str)
def test_small_integers_are_exact(case: Case, isa: str) -> None:
    """Sums of small integers are exact in any order, so any difference is a wrong element and no rounding."""
    sample = case.build(torch.float32)
    args = [
        (a * 2).round().clamp(-3, 3) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in sample.args
    ]
    whole = type(sample)(tuple(args), sample.kwargs)
    ours, exact = whole.requiring_grad(), whole.to(torch.float64).requiring_grad()
    our_outputs, exact_outputs = call(case.function, ours), call(case.reference, exact)
    grads = [g.round().clamp(-2, 2) for g in random_like(exact_outputs)]
    for a, b in zip(our_outputs, exact_outputs, strict=True):
        assert torch.equal(a.double(), b)
    our_grads = gradients(our_outputs, ours, [g.float() for g in grads])
    for a, b in zip(our_grads, gradients(exact_outputs, exact, grads), strict=True):
        assert torch.equal(a.double(), b)
