"""What must hold of a call: the oracle's values as closely as torch has them, its shapes and errors, and our own
promises about bits, strides and untouched inputs."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .calls import CALLS, Call
from .draw import Draw
from .layouts import GuardedMemory, in_layout

ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROUNDS = 8  # further samples that an error is judged by


@dataclass
class Finding:
    """Something that does not hold."""

    kind: str
    text: str


@dataclass
class Result:
    """Tensors that a call gave: outputs, gradients and, where asked for, gradients of those."""

    outputs: list[Tensor]
    gradients: list[Tensor | None]
    records: list[bool]  # which outputs require gradients

    def named(self) -> dict[str, Tensor | None]:
        """Every tensor by the name that a finding gives it."""
        names = {f"output {i}": tensor for i, tensor in enumerate(self.outputs)}
        return names | {f"gradient {i}": tensor for i, tensor in enumerate(self.gradients)}


@dataclass
class Case:
    """A drawn call with its tensors as they are given to ours."""

    call: Call
    dtype: torch.dtype
    tensors: list[Tensor]
    wanted: list[int]  # the tensors that take gradients
    second_order: bool
    grad_seed: int
    rounds_factors: bool = False  # half types: kernels round a factor that is itself a result, such as probabilities
    flat: Tensor | None = None  # where a fused activation has a kink: no gradient is asked for there
    findings: list[Finding] = field(default_factory=list)

    def report(self, kind: str, text: str) -> None:
        """Notes that something does not hold."""
        self.findings.append(Finding(kind, text))

    def random_like(self, tensors: list[Tensor], seed: int) -> list[Tensor]:
        """Gradients of outputs: values of the case's type, laid out anyhow for ours."""
        draw = Draw(self.grad_seed + seed)
        values = [draw.normal(*tensor.shape).to(self.dtype) for tensor in tensors]
        if self.flat is not None:
            values = [v.masked_fill(self.flat, 0) if v.shape == self.flat.shape else v for v in values]
        return [value.to(tensor.dtype) for value, tensor in zip(values, tensors, strict=True)]


def draw_case(operation: str, seed: int, values_round: int, memory: GuardedMemory) -> Case:
    """The case of a seed. Expanded and overlapping layouts decide values, so the oracle takes the tensors from here."""
    draw = Draw(seed, values_round)
    call = CALLS[operation](draw)
    dtype = draw.one_of(*DTYPES)
    tensors = []
    for i, tensor in enumerate(call.tensors):
        wide = i in call.float32_beside_half and dtype in (torch.bfloat16, torch.float16)
        laid = in_layout(tensor.to(torch.float32 if wide else dtype), draw)
        tensors.append(memory.copy(laid, draw.chance(0.7)) if draw.chance(0.4) else laid)
    wanted = [i for i in call.differentiable if draw.chance(0.75)]
    small = sum(tensor.numel() for tensor in tensors) < 4000
    second_order = bool(wanted) and dtype in (torch.float32, torch.float64) and small and draw.chance(0.15)
    case = Case(call, dtype, tensors, wanted, second_order, draw.random.randrange(2**31) + values_round)
    if call.before_kinks is not None:
        with contextlib.suppress(Exception):  # an error is the oracle's to raise
            y = call.before_kinks(*exact(tensors))[0]
            near = [(y - kink).abs() < 64 * ROUNDING[dtype] * (1 + y.abs()) for kink in call.kinks]
            case.flat = torch.stack(near).any(0)
    return case


def exact(tensors: list[Tensor]) -> list[Tensor]:
    """The same values in float64, contiguous."""
    return [t.detach().double().contiguous() if t.is_floating_point() else t for t in tensors]


def run(case: Case, function: Callable[..., Any], tensors: list[Tensor], grads_laid_out: bool = False) -> Result:
    """Outputs and gradients of ``function``, the second order where the case asks for it."""
    leaves = [t.detach().requires_grad_(i in case.wanted) for i, t in enumerate(tensors)]
    returned = function(*leaves)
    outputs = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    result = Result([o.detach() for o in outputs], [], [o.requires_grad for o in outputs])
    recorded = [o for o in outputs if o.requires_grad]
    if not recorded:
        return result
    grads = case.random_like(recorded, 1)
    if grads_laid_out:
        layout = Draw(case.grad_seed)
        grads = [_same_values(grad, in_layout(grad, layout)) for grad in grads]
    inputs = [leaves[i] for i in case.wanted]
    if not case.second_order:
        result.gradients = list(torch.autograd.grad(recorded, inputs, grads, allow_unused=True))
        return result
    grads = [grad.detach().requires_grad_() for grad in grads]
    first = torch.autograd.grad(recorded, inputs, grads, allow_unused=True, create_graph=True)
    result.gradients = [None if g is None else g.detach() for g in first]
    again = [g for g in first if g is not None and g.requires_grad]
    if again:
        total = sum((g * v).sum() for g, v in zip(again, case.random_like(again, 2), strict=True))
        result.gradients += torch.autograd.grad(total, [*inputs, *grads], allow_unused=True)
    return result


def _same_values(value: Tensor, laid: Tensor) -> Tensor:
    """``laid`` where its layout kept the values."""
    return laid if torch.equal(laid, value) else value


def attempt(case: Case, function: Callable[..., Any], tensors: list[Tensor], laid: bool = False) -> Result | Exception:
    """The result, or the error that was raised."""
    try:
        return run(case, function, tensors, laid)
    except Exception as error:
        return error


@dataclass
class Error:
    """The largest error of one tensor, torch's for the same, the largest value, and the largest sum of terms' sizes
    where factors were rounded."""

    ours: float
    torchs: float
    scale: float
    dtype: torch.dtype
    terms: float = 0.0

    def allowed(self, scale_of_all: float) -> float:
        """Twice torch's and some roundings of the largest value; where terms cancel, some roundings of those."""
        return max(self._allowed(scale_of_all), 2 * self.torchs + 4 * ROUNDING[self.dtype] * self.terms)

    def _allowed(self, scale_of_all: float) -> float:
        if self.scale < 1e-9 * scale_of_all:
            return 64 * ROUNDING[self.dtype] * scale_of_all
        scale = max(self.scale, 0.05 * scale_of_all)
        if scale < 1e-6:
            return {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[self.dtype]
        if self.dtype == torch.float64:
            return 1e-12 * scale
        smallest = 2.0**-25 if self.dtype == torch.float16 else 1e-44
        return 2 * self.torchs + 4 * ROUNDING[self.dtype] * scale + smallest


def compare(case: Case, ours: Result, oracle: Result, torchs: Result | None) -> dict[str, Error]:
    """Reports what differs in kind and returns the errors of what is finite everywhere."""
    if ours.records != oracle.records or len(ours.gradients) != len(oracle.gradients):
        case.report("requires_grad", f"ours {ours.records}, torch {oracle.records}")
        return {}
    errors = {}
    by_torch = torchs.named() if torchs is not None else {}
    for (name, mine), right in zip(ours.named().items(), oracle.named().values(), strict=True):
        if mine is None or right is None:
            given = mine if mine is not None else right
            if given is not None and bool((given != 0).any()):
                case.report("undefined gradient", f"{name}: ours {mine is not None}, torch {right is not None}")
            continue
        theirs = by_torch.get(name)
        if mine.shape != right.shape:
            case.report("shape", f"{name}: ours {tuple(mine.shape)}, torch {tuple(right.shape)}")
            continue
        if theirs is not None and mine.dtype != theirs.dtype:
            case.report("type", f"{name}: ours {mine.dtype}, torch {theirs.dtype}")
        error = compare_values(case, name, mine, right, theirs)
        if error is not None:
            errors[name] = error
    note_terms(case, oracle, errors)
    return errors


def note_terms(case: Case, oracle: Result, errors: dict[str, Error]) -> None:
    """Where factors are rounded, gradients are as exact as their terms, which may cancel."""
    half = case.dtype in (torch.bfloat16, torch.float16)
    if case.rounds_factors and half and case.call.terms is not None and oracle.gradients:
        sums = case.call.terms(exact(case.tensors), case.random_like(oracle.outputs, 1)[0])
        for number, argument in enumerate(case.wanted):
            if f"gradient {number}" in errors and sums[argument].numel() > 0:
                errors[f"gradient {number}"].terms = float(sums[argument].nan_to_num().max())


def compare_values(case: Case, name: str, mine: Tensor, right: Tensor, theirs: Tensor | None) -> Error | None:
    """Infinite values and NaN must be where the oracle or torch has them; the rest has an error."""
    rounded = right.to(mine.dtype)
    if case.second_order:  # of a mean over no rows torch's are NaN; ours are zero, as the losses' documents say
        rounded = rounded.where(~(rounded.isnan() & (mine == 0)), 0)
    special = ~(mine.isfinite() & rounded.isfinite())
    if bool(special.any()) and not _same_class(mine, rounded) and (theirs is None or not _same_class(mine, theirs)):
        counts = f"{int(mine.isnan().sum())} NaN and {int(mine.isinf().sum())} infinite"
        expected = f"{int(rounded.isnan().sum())} and {int(rounded.isinf().sum())}"
        case.report("not finite", f"{name}: {counts} of {mine.numel()}, in float64 {expected}")
    finite = ~special if theirs is None else ~special & theirs.isfinite()
    if not bool(finite.any()):
        return None
    mine, right = mine[finite].double(), right[finite].double()
    torchs = 0.0 if theirs is None else float((theirs[finite].double() - right).abs().max())
    return Error(float((mine - right).abs().max()), torchs, float(right.abs().max()), rounded.dtype)


def _same_class(a: Tensor, b: Tensor) -> bool:
    """Whether NaN, and infinities of each sign, are at the same places."""
    return all(torch.equal(a == value, b == value) for value in (torch.inf, -torch.inf)) and torch.equal(
        a.isnan(), b.isnan()
    )


def check_accuracy(operation: str, seed: int, case: Case, errors: dict[str, Error]) -> None:
    """An error above what is allowed is judged by the mean of some samples: torch is lucky at times."""
    scales = {kind: max((e.scale for n, e in errors.items() if n.startswith(kind)), default=0.0) for kind in ("o", "g")}
    suspicious = [name for name, error in errors.items() if error.ours > error.allowed(scales[name[0]])]
    if not suspicious:
        return
    samples = [errors]
    for values_round in range(1, ROUNDS + 1):
        with GuardedMemory() as memory:
            again = draw_case(operation, seed, values_round, memory)
            again.rounds_factors = case.rounds_factors
            results = run_all(again)
            if all(isinstance(result, Result) for result in results):
                samples.append(compare(again, *results))
    for name in suspicious:
        found = [sample[name] for sample in samples if name in sample]
        ours = sum(error.ours for error in found) / len(found)
        allowed = sum(error.allowed(scales[name[0]]) for error in found) / len(found)
        if ours > allowed:
            torchs = sum(error.torchs for error in found) / len(found)
            text = f"{name}: error {ours:.2e}, torch {torchs:.2e}, values to {found[0].scale:.2e}"
            case.report("accuracy", f"{text}, mean of {len(found)}")


def run_all(case: Case) -> tuple[Any, Any, Any]:
    """Ours, the oracle and torch in the same type."""
    contiguous = [t.detach().clone(memory_format=torch.contiguous_format) for t in case.tensors]
    oracle = attempt(case, case.call.reference, exact(case.tensors))
    torchs = attempt(case, case.call.reference, contiguous)
    return attempt(case, case.call.ours, case.tensors, laid=True), oracle, torchs


def check_bits(case: Case, ours: Result) -> None:
    """Strides do not change a bit."""
    contiguous = [t.detach().clone(memory_format=torch.contiguous_format) for t in case.tensors]
    for (name, strided), plain in zip(
        ours.named().items(), run(case, case.call.ours, contiguous).named().values(), strict=True
    ):
        if strided is None or plain is None:
            if strided is not plain:
                case.report("bits", f"{name}: undefined in one layout")
        elif not torch.equal(strided.nan_to_num(), plain.nan_to_num()):
            off = float((strided.double() - plain.double()).abs().max())
            case.report("bits", f"{name}: strides change it by {off:.2e} of {float(plain.abs().max()):.2e}")


def check_fakes(case: Case) -> None:
    """Fake tensors have the shapes, types and strides of real ones."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = run(case, case.call.ours, [mode.from_tensor(t) for t in case.tensors])
    for (name, fake), real in zip(
        fakes.named().items(), run(case, case.call.ours, case.tensors).named().values(), strict=True
    ):
        if fake is None or real is None:
            if fake is not real:
                case.report("fake", f"{name}: undefined in one of both")
        elif real.numel() > 0 and _layout(fake) != _layout(real):
            case.report("fake", f"{name}: {_layout(fake)}, but really {_layout(real)}")


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    strides = [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    return tuple(tensor.shape), tensor.dtype, strides


def check(operation: str, seed: int, bits: bool = True, rounds_factors: bool = False) -> Case:
    """Runs the case of ``seed`` and notes what does not hold. ``bits``: whether layouts must agree to the last bit;
    ``rounds_factors``: whether kernels of half types multiply probabilities in these."""
    with GuardedMemory() as memory:
        case = draw_case(operation, seed, 0, memory)
        case.rounds_factors = rounds_factors
        before = [t.detach().clone() for t in case.tensors]
        ours, oracle, torchs = run_all(case)
        for i, (tensor, copy) in enumerate(zip(case.tensors, before, strict=True)):
            if not torch.equal(tensor.nan_to_num(), copy.nan_to_num()):
                case.report("input modified", f"tensor {i}")
        if isinstance(ours, Exception) or isinstance(oracle, Exception):
            if not isinstance(oracle, Exception):
                case.report("raises", f"{type(ours).__name__}: {ours}")
            elif not isinstance(ours, Exception):
                case.report("does not raise", f"torch: {type(oracle).__name__}: {oracle}")
            return case
        errors = compare(case, ours, oracle, torchs if isinstance(torchs, Result) else None)
        check_accuracy(operation, seed, case, errors)
        drawn = random.Random(seed).random()
        if bits and drawn < 0.3 and not case.second_order:  # which is composed of torch's operators
            check_bits(case, ours)
        elif drawn > 0.95 and not any(t.is_neg() for t in case.tensors):
            check_fakes(case)
    return case


def cases(operations: list[str], first_seed: int) -> Iterator[tuple[str, int]]:
    """Operations in turn, each with the next seed."""
    seed = first_seed
    while True:
        yield operations[seed % len(operations)], seed
        seed += 1
