"""Tensors laid out in memory as programs lay them out, and memory that ends where nothing may be touched."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

from .draw import Draw


def _contiguous(tensor: Tensor, draw: Draw) -> Tensor:
    return tensor


def _permuted(tensor: Tensor, draw: Draw) -> Tensor:
    order = list(range(tensor.dim()))
    draw.random.shuffle(order)
    return tensor.permute(order).contiguous().permute([order.index(i) for i in range(tensor.dim())])


def _sliced(tensor: Tensor, draw: Draw) -> Tensor:
    """Every second or third element of a dimension."""
    dim, step = draw.random.randrange(tensor.dim()), draw.one_of(2, 3)
    shape = list(tensor.shape)
    shape[dim] *= step
    around = tensor.new_full(shape, 7)
    view = around[(slice(None),) * dim + (slice(draw.random.randrange(step), None, step),)]
    return view.copy_(tensor)


def _surrounded(tensor: Tensor, draw: Draw) -> Tensor:
    """A window of a larger tensor, with NaN around it."""
    margins = [(draw.random.randrange(3), draw.random.randrange(3)) for _ in tensor.shape]
    shape = [before + size + after for size, (before, after) in zip(tensor.shape, margins, strict=True)]
    around = tensor.new_full(shape, torch.nan if tensor.is_floating_point() else -1)
    window = tuple(slice(before, before + size) for size, (before, _) in zip(tensor.shape, margins, strict=True))
    return around[window].copy_(tensor)


def _expanded(tensor: Tensor, draw: Draw) -> Tensor:
    """One element of a dimension for all; this changes the values."""
    dims = [dim for dim, size in enumerate(tensor.shape) if size > 1]
    for dim in draw.random.sample(dims, min(len(dims), draw.one_of(1, 1, 2))):
        tensor = tensor.narrow(dim, 0, 1).expand(tensor.shape)
    return tensor


def _channels_last(tensor: Tensor, draw: Draw) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats[tensor.dim()]) if tensor.dim() in formats else tensor


def _offset(tensor: Tensor, draw: Draw) -> Tensor:
    """At an address that no vector is aligned to."""
    offset = draw.one_of(1, 3, 5, 7)
    return tensor.new_zeros(tensor.numel() + offset)[offset:].view(tensor.shape).copy_(tensor)


def _negative(tensor: Tensor, draw: Draw) -> Tensor:
    """With the negative bit, which is resolved when it is read."""
    return torch._neg_view(-tensor) if tensor.is_floating_point() else tensor


def _overlapping(tensor: Tensor, draw: Draw) -> Tensor:
    """Windows that share elements; this changes the values."""
    if not tensor.is_floating_point():
        return tensor
    strides = [draw.one_of(0, 1, 1, 2, 3, 7) for _ in tensor.shape]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    return draw.normal(extent).to(tensor.dtype).as_strided(tensor.shape, strides)


LAYOUTS: dict[Callable[[Tensor, Draw], Tensor], int] = {
    _contiguous: 30,
    _permuted: 16,
    _sliced: 12,
    _surrounded: 8,
    _expanded: 8,
    _channels_last: 12,
    _offset: 10,
    _negative: 4,
    _overlapping: 4,
}


def in_layout(tensor: Tensor, draw: Draw) -> Tensor:
    """``tensor`` in a layout that is drawn. Expanding and overlapping change its values."""
    layout = draw.random.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
    return layout(tensor, draw) if tensor.numel() > 0 and tensor.dim() > 0 else tensor


class GuardedMemory:
    """Lends tensors whose first or last element lies at a page that may not be touched: reading or writing beyond it is
    a segmentation fault. The tensors end with the ``with`` block."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._mapped: list[tuple[int, int]] = []

    def __enter__(self) -> GuardedMemory:
        return self

    def __exit__(self, *_: object) -> None:
        for address, size in self._mapped:
            self._libc.munmap(address, size)
        self._mapped.clear()

    def _memory(self, size: int, at_end: bool) -> ctypes.Array[ctypes.c_char]:
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = pages + 2 * mmap.PAGESIZE
        private, anonymous = 0x02, 0x20
        address = self._libc.mmap(None, whole, mmap.PROT_READ | mmap.PROT_WRITE, private | anonymous, -1, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise MemoryError(f"no {whole} bytes to map")
        self._mapped.append((address, whole))
        for page in (address, address + mmap.PAGESIZE + pages):
            self._libc.mprotect(page, mmap.PAGESIZE, 0)
        begin = address + mmap.PAGESIZE + (pages - size if at_end else 0)
        return (ctypes.c_char * size).from_address(begin)

    def copy(self, tensor: Tensor, at_end: bool = True) -> Tensor:
        """The same values and strides, with the last (or first) element at the guarded page."""
        if tensor.numel() == 0 or tensor.is_neg():
            return tensor
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        memory = self._memory(extent * tensor.element_size(), at_end)
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=extent)
        flat.copy_(tensor.detach().as_strided((extent,), (1,), tensor.storage_offset()))
        return flat.as_strided(tensor.shape, tensor.stride(), 0)
