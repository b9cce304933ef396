"""Measuring: contenders interleaved in one process, after their results have been compared.

A :class:`Case` is one call on one shape; it builds the same inputs for every contender. For each direction (forward;
backward; forward and backward) the harness

1. compares our outputs and gradients with torch's, and measures nothing that differs;
2. chooses how many calls one sample holds, so that a sample is long against the clock;
3. takes samples in turns, ours, torch's, ours, torch's, ..., so that a change of the machine's speed meets both;
4. reports median, spread (interquartile range over the median) and minimum, page faults a call, and the share of the
   attainable speed: the time that the bytes that must move need at the copy bandwidth measured in this run, or the
   operations at the measured rate of the arithmetic units, whichever is longer (Williams et al. 2009, the roofline),
   over the measured time.

A GPU's samples lie between two of its own events, with enough calls in between that the time of launching them hides
behind the time of running them. Its copy bandwidth is that of one tensor into another, its rate that of torch's
product of two large matrices in full float32 or in the half type.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from .. import _C

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]
Program = Callable[[], object]
Stopwatch = Callable[[Program, int], float]

PROCESSOR = torch.device("cpu")

OURS = "dlkernels"
TORCH = "torch"
FORWARD = "forward"
BACKWARD = "backward"
BOTH = "forward + backward"
DIRECTIONS = (FORWARD, BACKWARD, BOTH)
MEASURED = (FORWARD, BOTH)  # where none is chosen

BEST = "best of torch's"

# Largest relative difference (root mean square) from torch in the same type that still counts as the same result.
SAME = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Cost:
    """What a call must at least do: bytes read and written, operations (a multiplication and a sum are two)."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class Problem:
    """The inputs of a case and the two functions of them, ours and torch's.

    Every floating-point tensor in ``inputs`` that requires a gradient gets one. A state that a function changes, as
    batch norm its running mean, is its own business. ``backends`` are torch's other ways to the same result, by name:
    each is a contender where it can take the inputs.
    """

    inputs: tuple[Tensor, ...]
    ours: Function
    peer: Function
    backends: Mapping[str, Function] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One call on one shape of a real network."""

    column: str
    group: str  # the class that its ratio is averaged in
    name: str  # network, layer and shape
    dtype: torch.dtype
    build: Callable[[torch.device], Problem] = field(repr=False)
    forward: Cost
    both: Cost

    def cost(self, direction: str) -> Cost:
        """Of one of :data:`DIRECTIONS`; backward is what forward leaves of both."""
        if direction == BACKWARD:
            return Cost(self.both.bytes - self.forward.bytes, self.both.operations - self.forward.operations)
        return self.forward if direction == FORWARD else self.both


@dataclass(kw_only=True)
class Times:
    """What was measured of several contenders. Seconds and faults are per call, by contender."""

    median: dict[str, float] = field(default_factory=dict)
    minimum: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)  # interquartile range over the median
    page_faults: dict[str, float] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)  # the contender's median time over ours

    def take(self, programs: dict[str, Program], budget: Budget, elapsed: Stopwatch) -> None:
        """Measures ``programs``, ours among them, in turns."""
        seconds, faults = interleave(programs, budget, elapsed)
        self.median = {name: statistics.median(samples) for name, samples in seconds.items()}
        self.minimum = {name: min(samples) for name, samples in seconds.items()}
        self.spread = {name: interquartile_range(samples) / self.median[name] for name, samples in seconds.items()}
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
    arithmetic_rate: dict[str, float]  # operations a second of multiply-adds, by type

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


def interquartile_range(samples: Sequence[float]) -> float:
    """How far apart the quartiles lie, which one slow sample does not move; nothing for a single sample."""
    if len(samples) == 1:
        return 0.0
    lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return upper - lower


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


def program(
    function: Function, inputs: tuple[Tensor, ...], grad_outputs: tuple[Tensor, ...], direction: str
) -> Program:
    """One call: forward without gradients, backward of one forward pass that is kept, or both."""
    leaves = tuple(value for value in inputs if value.requires_grad)
    kept = outputs_of(function(*inputs)) if direction == BACKWARD else ()

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return outputs_of(function(*inputs))

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(kept, leaves, grad_outputs, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        outputs = outputs_of(function(*inputs))
        return (*outputs, *torch.autograd.grad(outputs, leaves, grad_outputs))

    return {FORWARD: forward, BACKWARD: backward, BOTH: both}[direction]


def page_faults() -> int:
    """Pages that the system has had to map in for this process, without reading them from a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def stopwatch(device: torch.device) -> Stopwatch:
    """Seconds that a program takes ``calls`` times in a row, on the clock of the device that runs it."""

    def on_processor(call: Program, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - start

    def on_gpu(call: Program, calls: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    return on_gpu if device.type == "cuda" else on_processor


def interleave(
    programs: dict[str, Program], budget: Budget, elapsed: Stopwatch, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Samples every program in turns, A B A B ...; returns seconds and page faults per call of each sample."""
    calls: dict[str, int] = {}
    for name, call in programs.items():  # the first call warms up, the second is a first estimate
        call()
        calls[name] = max(1, min(10_000, math.ceil(budget.sample_seconds / max(elapsed(call, 1), 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    faults: dict[str, list[float]] = {name: [] for name in programs}
    begin = clock()
    for done in range(budget.most_rounds):
        if done >= budget.rounds and clock() - begin > budget.seconds:
            break
        for name, call in programs.items():
            faults_before = page_faults()
            seconds[name].append(elapsed(call, calls[name]) / calls[name])
            faults[name].append((page_faults() - faults_before) / calls[name])
    return seconds, faults


def contenders(problem: Problem, compiled: bool) -> dict[str, Function]:
    """Ours and torch's functions by name; one of torch's backends counts where it takes the inputs, both ways."""
    functions = {OURS: problem.ours, TORCH: problem.peer}
    for name, function in problem.backends.items():
        try:
            outputs = outputs_of(function(*problem.inputs))
            program(function, problem.inputs, tuple(map(torch.ones_like, outputs)), BOTH)()
        except RuntimeError:  # "no available kernel"
            continue
        functions[name] = function
    if compiled:
        torch.compiler.reset()
        functions["torch.compile"] = torch.compile(problem.peer)
    return functions


def measure(
    case: Case,
    ceilings: Ceilings,
    budget: Budget,
    compiled: bool = False,
    device: torch.device = PROCESSOR,
    directions: Collection[str] = MEASURED,
) -> list[Result]:
    """One case in each of the directions; the times of a result that differs from torch's are not taken."""
    problem = case.build(device)
    functions = contenders(problem, compiled)
    with torch.no_grad():
        shapes = outputs_of(problem.peer(*problem.inputs))
    grad_outputs = tuple(torch.randn_like(out) for out in shapes)

    results = []
    # A compiled backward pass may reuse the memory of what forward saved, unless it is to run again.
    with functorch_config.patch(donated_buffer=BACKWARD not in directions):
        for direction in (known for known in DIRECTIONS if known in directions):
            programs = {
                name: program(function, problem.inputs, grad_outputs, direction) for name, function in functions.items()
            }
            result = compared(case, direction, programs)
            results.append(result)
            if not result.same:
                continue
            result.take(programs, budget, stopwatch(device))
            if problem.backends:
                best = min(result.median[name] for name in (TORCH, *problem.backends) if name in programs)
                result.median[BEST], result.ratio[BEST] = best, best / result.median[OURS]
            result.share_of_ceiling = ceilings.seconds(case.cost(direction), result.dtype) / result.median[OURS]
    return results


def compared(case: Case, direction: str, programs: dict[str, Program]) -> Result:
    """What there is to say of a case in one direction before it is timed: above all, whether the results agree."""
    pairs = zip(programs[OURS](), programs[TORCH](), strict=True)  # type: ignore[call-overload]
    error = largest(relative_difference(ours, peer) for ours, peer in pairs)
    cost = case.cost(direction)
    return Result(
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


def best_rate(call: Program, amount: float, seconds: float, elapsed: Stopwatch) -> float:
    """``amount`` over the shortest of the calls that fit into ``seconds``."""
    call()
    shortest, begin = math.inf, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        shortest = min(shortest, elapsed(call, 1))
    return amount / shortest


def multiplication(dtype: torch.dtype, device: torch.device, size: int = 8192) -> tuple[Program, float]:
    """What shows the rate of a device's arithmetic units, and its operations."""
    if device.type == "cuda":
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        return lambda: torch.mm(left, right), 2.0 * size**3
    like = torch.empty(0, dtype=dtype)
    return lambda: _C.arithmetic_operations(like, 10_000), _C.arithmetic_operations(like, 1) * 10_000


def measure_ceilings(dtypes: Sequence[torch.dtype], quick: bool = False, device: torch.device = PROCESSOR) -> Ceilings:
    """Copy bandwidth out of the cache's reach, and the rate of multiply-adds for each type."""
    megabytes = (64 if quick else 256) if device.type == "cpu" else 1024
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    seconds, elapsed = 0.1 if quick else 0.5, stopwatch(device)
    moved = 2.0 * source.numel() * source.element_size()
    copy_rate = best_rate(lambda: target.copy_(source), moved, seconds, elapsed)
    rates = {}
    for dtype in dtypes:
        call, operations = multiplication(dtype, device)
        rates[dtype_name(dtype)] = best_rate(call, operations, seconds, elapsed)
    return Ceilings(copy_rate, rates)
