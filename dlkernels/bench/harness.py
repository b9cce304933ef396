"""Measuring: contenders interleaved in one process, after their results have been compared.

A :class:`Case` is one call on one shape; it builds the same inputs for every contender. For each direction (forward;
forward and backward) the harness

1. compares our outputs and gradients with torch's, and measures nothing that differs;
2. chooses how many calls one sample holds, so that a sample is long against the clock;
3. takes samples in turns, ours, torch's, ours, torch's, ..., so that a change of the machine's speed meets both;
4. reports median and minimum, page faults a call, and the share of the attainable speed: the time that the bytes that
   must move need at the copy bandwidth measured in this run, or the operations at the measured rate of the arithmetic
   units, whichever is longer (Williams et al. 2009, the roofline), over the measured time.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import _C

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]
Program = Callable[[], object]

OURS = "dlkernels"
TORCH = "torch"
FORWARD = "forward"
BOTH = "forward + backward"

# Largest relative difference (root mean square) from torch in the same type that still counts as the same result.
SAME = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Cost:
    """What a call must at least do: bytes read and written, operations (a multiplication and a sum are two)."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class Problem:
    """The inputs of a case and the two functions of them, ours and torch's.

    Every floating-point tensor in ``inputs`` that requires a gradient gets one. A state that a function changes, as
    batch norm its running mean, is its own business.
    """

    inputs: tuple[Tensor, ...]
    ours: Function
    peer: Function


@dataclass(frozen=True)
class Case:
    """One call on one shape of a real network."""

    column: str
    group: str  # the class that its ratio is averaged in
    name: str  # network, layer and shape
    dtype: torch.dtype
    build: Callable[[], Problem] = field(repr=False)
    forward: Cost
    both: Cost


@dataclass(kw_only=True)
class Times:
    """What was measured of several contenders. Seconds and faults are per call, by contender."""

    median: dict[str, float] = field(default_factory=dict)
    minimum: dict[str, float] = field(default_factory=dict)
    page_faults: dict[str, float] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)  # the contender's median time over ours

    def take(self, programs: dict[str, Program], budget: Budget) -> None:
        """Measures ``programs``, ours among them, in turns."""
        seconds, faults = interleave(programs, budget)
        self.median = {name: statistics.median(samples) for name, samples in seconds.items()}
        self.minimum = {name: min(samples) for name, samples in seconds.items()}
        self.page_faults = {name: statistics.median(samples) for name, samples in faults.items()}
        self.ratio = {name: self.median[name] / self.median[OURS] for name in programs if name != OURS}


@dataclass(kw_only=True)
class Result(Times):
    """One case in one direction."""

    column: str
    group: str
    name: str
    dtype: str
    direction: str
    bytes: float
    operations: float
    error: float  # relative difference between ours and torch's, the largest over outputs and gradients
    same: bool
    share_of_ceiling: float | None = None


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached during this run."""

    copy_bytes_per_second: float
    arithmetic_rate: dict[str, float]  # operations a second of multiply-adds in registers on every thread, by type

    def seconds(self, cost: Cost, dtype: str) -> float:
        """The time that a call of this cost needs at least."""
        return max(cost.bytes / self.copy_bytes_per_second, cost.operations / self.arithmetic_rate[dtype])


@dataclass(frozen=True)
class Budget:
    """How long to measure: at least ``rounds`` samples a contender, more until ``seconds`` have passed."""

    seconds: float = 0.6
    rounds: int = 5
    most_rounds: int = 60
    sample_seconds: float = 2e-3


QUICK = Budget(seconds=0.12, rounds=3, sample_seconds=1e-3)
FULL = Budget()


def geometric_mean(values: Iterable[float]) -> float:
    """The n-th root of the product.

    Raises:
        ValueError: there is no value, or one is not positive.
    """
    numbers = list(values)
    if not numbers or min(numbers) <= 0:
        raise ValueError(f"a geometric mean needs positive values, got {numbers}")
    return math.exp(math.fsum(map(math.log, numbers)) / len(numbers))


def largest(values: Iterable[float]) -> float:
    """The maximum; NaN where any of ``values`` is."""
    numbers = list(values)
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``float32``."""
    return str(dtype).removeprefix("torch.")


def relative_difference(result: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over that of the reference."""
    difference = torch.linalg.vector_norm((result.double() - reference.double()).flatten())
    return (difference / torch.linalg.vector_norm(reference.double().flatten()).clamp_min(1e-30)).item()


def outputs_of(result: object) -> tuple[Tensor, ...]:
    """The tensors that a function returned, one or several."""
    return result if isinstance(result, tuple) else (result,)  # type: ignore[return-value]


def program(function: Function, inputs: tuple[Tensor, ...], grad_outputs: tuple[Tensor, ...] | None) -> Program:
    """One call: forward without gradients, or forward and backward when ``grad_outputs`` are given."""
    leaves = tuple(value for value in inputs if value.requires_grad)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return outputs_of(function(*inputs))

    def both() -> tuple[Tensor, ...]:
        outputs = outputs_of(function(*inputs))
        return (*outputs, *torch.autograd.grad(outputs, leaves, grad_outputs))

    return forward if grad_outputs is None else both


def page_faults() -> int:
    """Pages that the system has had to map in for this process, without reading them from a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def interleave(
    programs: dict[str, Program], budget: Budget, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Samples every program in turns, A B A B ...; returns seconds and page faults per call of each sample."""
    calls: dict[str, int] = {}
    for name, call in programs.items():  # the first call warms up, the second is a first estimate
        call()
        start = clock()
        call()
        calls[name] = max(1, min(10_000, math.ceil(budget.sample_seconds / max(clock() - start, 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    faults: dict[str, list[float]] = {name: [] for name in programs}
    begin = clock()
    for done in range(budget.most_rounds):
        if done >= budget.rounds and clock() - begin > budget.seconds:
            break
        for name, call in programs.items():
            faults_before, start = page_faults(), clock()
            for _ in range(calls[name]):
                call()
            seconds[name].append((clock() - start) / calls[name])
            faults[name].append((page_faults() - faults_before) / calls[name])
    return seconds, faults


def measure(case: Case, ceilings: Ceilings, budget: Budget, compiled: bool = False) -> list[Result]:
    """One case in both directions; the times of a result that differs from torch's are not taken."""
    problem = case.build()
    functions = {OURS: problem.ours, TORCH: problem.peer}
    if compiled:
        torch.compiler.reset()
        functions["torch.compile"] = torch.compile(problem.peer)
    with torch.no_grad():
        shapes = outputs_of(problem.peer(*problem.inputs))
    grad_outputs = tuple(torch.randn_like(out) for out in shapes)

    results = []
    for direction, cost, grads in ((FORWARD, case.forward, None), (BOTH, case.both, grad_outputs)):
        programs = {name: program(function, problem.inputs, grads) for name, function in functions.items()}
        pairs = zip(programs[OURS](), programs[TORCH](), strict=True)  # type: ignore[call-overload]
        error = largest(relative_difference(ours, peer) for ours, peer in pairs)
        result = Result(
            column=case.column,
            group=case.group,
            name=case.name,
            dtype=dtype_name(case.dtype),
            direction=direction,
            bytes=cost.bytes,
            operations=cost.operations,
            error=error,
            same=error <= SAME[case.dtype],
        )
        results.append(result)
        if not result.same:
            continue
        result.take(programs, budget)
        result.share_of_ceiling = ceilings.seconds(cost, result.dtype) / result.median[OURS]
    return results


def best_rate(call: Program, amount: float, seconds: float) -> float:
    """``amount`` over the shortest of the calls that fit into ``seconds``."""
    call()
    shortest, begin = math.inf, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - start)
    return amount / shortest


def measure_ceilings(dtypes: Sequence[torch.dtype], quick: bool = False) -> Ceilings:
    """Copy bandwidth out of the cache's reach, and the rate of multiply-adds in registers for each type."""
    source = torch.ones((64 if quick else 256) * 2**20 // 4)
    target = torch.empty_like(source)
    seconds = 0.1 if quick else 0.5
    copy_rate = best_rate(lambda: target.copy_(source), 2.0 * source.numel() * source.element_size(), seconds)
    rates = {}
    for dtype in dtypes:
        like = torch.empty(0, dtype=dtype)
        operations = _C.arithmetic_operations(like, 1) * 10_000
        rates[dtype_name(dtype)] = best_rate(
            lambda like=like: _C.arithmetic_operations(like, 10_000),  # type: ignore[misc]
            operations,
            seconds,
        )
    return Ceilings(copy_rate, rates)
