"""The CUDA kernels on the host: the same bits in whatever order threads run, and what only they have to fear.

That their values and gradients are torch's, the shared suites show: "simt" is one of their instruction sets.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dlkernels import _C
from dlkernels import functional as F

from ..cases import Case, all_cases, call, gradients, random_like

SCHEDULES = ("forward", "reverse", "random", "warp_ahead")


@pytest.fixture(autouse=True)
def on_host() -> Iterator[None]:
    """Runs every operation on the CUDA kernels as the host simulates them."""
    chosen = _C.isa()
    if not _C.select_isa("simt"):
        pytest.skip("the extension was built without DLKERNELS_SIMT=1")
    yield
    set_schedule("forward")
    _C.select_isa(chosen)


def set_schedule(name: str) -> None:
    ctypes.CDLL(_C.__file__).simt_set_schedule(SCHEDULES.index(name))


def results(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of a case."""
    sample = case.build(dtype).requiring_grad()
    outputs = call(case.function, sample)
    return [*outputs, *gradients(outputs, sample, random_like([o for o in outputs if o.requires_grad]))]


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_bits_do_not_depend_on_the_order_of_threads(case: Case) -> None:
    set_schedule("forward")
    expected = results(case, torch.float32)
    for schedule in SCHEDULES[1:]:
        set_schedule(schedule)
        assert all(torch.equal(a, b) for a, b in zip(results(case, torch.float32), expected, strict=True)), schedule


@pytest.mark.parametrize("classes", [1, 2, 7, 8, 9, 31, 33, 1023, 1025, 3001])
@pytest.mark.parametrize("offset", range(4), ids=lambda offset: f"offset_{offset}")
def test_rows_of_any_length_at_any_address(classes: int, offset: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(classes)
    storage = torch.randn(3 * classes + offset, generator=generator).to(dtype)
    logits = storage[offset:].view(3, classes).requires_grad_()
    target = torch.randint(classes, (3,), generator=generator)
    exact_logits = logits.detach().double().requires_grad_()
    loss, exact = F.cross_entropy(logits, target), torch.nn.functional.cross_entropy(exact_logits, target)
    (grad,), (exact_grad,) = torch.autograd.grad(loss, logits), torch.autograd.grad(exact, exact_logits)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=tolerance, atol=tolerance)


def test_all_sizes_of_teams_agree() -> None:
    """A warp, eight and sixteen warps a row take turns by the number of classes; -inf classes change nothing."""
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 100, generator=generator), torch.tensor([3, 99])
    expected = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    for classes in (100, 2000, 33000):
        wide = torch.full((2, classes), -float("inf"))
        wide[:, :100] = logits
        actual = F.cross_entropy(wide, target, reduction="none")
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("everywhere", [False, True], ids=["one", "row"])
def test_nonfinite_logits_give_what_torch_gives(value: float, everywhere: bool) -> None:
    logits = torch.randn(2, 70, generator=torch.Generator().manual_seed(1))
    logits[1, slice(None) if everywhere else slice(40, 41)] = value
    target = torch.tensor([1, 2])
    actual = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(
        actual, torch.nn.functional.cross_entropy(logits, target, reduction="none"), equal_nan=True
    )


SIZES = [(1, 1, 1), (5, 3, 0), (64, 64, 64), (70, 130, 33), (260, 257, 40), (64, 72, 1100)]  # small, large, in slices


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("aligned", [True, False], ids=["chunks", "elements"])
def test_products_of_every_size_and_layout(size: tuple[int, int, int], aligned: bool, dtype: torch.dtype) -> None:
    rows, columns, depth = size
    generator = torch.Generator().manual_seed(rows)

    def matrix(lines: int, length: int) -> Tensor:
        stride = (length + 7) // 8 * 8 if aligned else length + 1
        storage = torch.randn(lines, stride + 8, generator=generator).to(dtype)
        return storage[:, 8 if aligned else 3 :][:, :length]

    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for left in (matrix(rows, depth), matrix(depth, rows).t()):
        for right in (matrix(columns, depth), matrix(depth, columns).t()):
            product, exact = F.linear(left, right), left.double() @ right.double().t()
            assert (product.double() - exact).norm() <= tolerance * exact.norm() + 1e-30


@pytest.fixture
def on_hopper() -> Iterator[Callable[[bool], None]]:
    """Switches Hopper's own kernels on and off."""
    library = ctypes.CDLL(_C.__file__)
    yield lambda wanted: library.simt_use_hopper(int(wanted))
    library.simt_use_hopper(0)


# One tile, ragged tiles of both widths, fewer than two boxes of columns, slices of the depth, more tiles than blocks.
HOPPER_SIZES = [(128, 128, 64), (193, 131, 200), (64, 64, 65), (70, 72, 2100), (300, 530, 136)]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", HOPPER_SIZES, ids=str)
def test_products_on_hopper_are_the_portable_ones(
    size: tuple[int, int, int], half: torch.dtype, on_hopper: Callable[[bool], None]
) -> None:
    """By another kernel, other instructions and other tiles, the same sums in the same order; see test_mutations.py for
    what its threads wait for."""
    rows, columns, depth = size
    generator = torch.Generator().manual_seed(columns)

    def matrix(lines: int, length: int) -> Tensor:
        storage = torch.randn(lines, (length + 7) // 8 * 8 + 8, generator=generator).to(half)
        return storage[:, 8:][:, :length]

    bias = torch.randn(columns, generator=generator).to(half)
    tolerance = 2e-3 if half == torch.float16 else 1e-2
    for left in (matrix(rows, depth), matrix(depth, rows).t()):
        for right in (matrix(columns, depth), matrix(depth, columns).t()):
            on_hopper(False)
            portable = F.linear(left, right, bias)
            on_hopper(True)
            product = F.linear(left, right, bias)
            exact = left.double() @ right.double().t() + bias.double()
            assert (product.double() - exact).norm() <= tolerance * exact.norm()
            # Slices are cut by the number of tiles, which differs.
            assert depth >= 1024 or torch.equal(product, portable)


def test_products_on_hopper_are_chosen_where_they_fit(on_hopper: Callable[[bool], None]) -> None:
    """An infinity beyond the matrix is not read: boxes end where it does."""
    on_hopper(True)
    storage = torch.full((130, 80), float("inf"), dtype=torch.bfloat16)
    storage[:100, :72] = 1
    inside = storage[:100, :72]
    assert torch.equal(F.linear(inside, inside), torch.full((100, 100), 72.0, dtype=torch.bfloat16))
    assert torch.equal(F.linear(inside[:3], inside[:5]), torch.full((3, 5), 72.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), torch.finfo(torch.float32).max], ids=str)
def test_products_with_extreme_numbers_give_what_torch_gives(value: float) -> None:
    """The parts of a split number must not turn infinity into NaN, nor the largest numbers into infinity."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(70, 40, generator=generator), torch.randn(70, 40, generator=generator)
    right[:5] = right[:5].sign()  # numbers that have no small part
    left[3, 7] = left[66, 39] = value
    left[3, 8:] = 0
    right /= 8  # the largest number stays finite
    actual, expected = F.linear(left, right), torch.nn.functional.linear(left, right)
    torch.testing.assert_close(actual, expected, equal_nan=True)
