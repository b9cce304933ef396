"""torch's own test database of modules: every sample and every error input, held against the modules here."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

pytest.importorskip("expecttest")  # which torch's database imports

from torch.testing._internal.common_modules import ErrorModuleInput, ModuleErrorEnum, ModuleInfo, ModuleInput, module_db

from .cases import ModuleInfoEntry, moduleinfo_entries

MODULES: dict[str, ModuleInfo] = {info.name: info for info in module_db}

entries = pytest.mark.parametrize("entry", moduleinfo_entries(), ids=str)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def leaves_of(value: Any) -> list[Tensor]:
    """The tensors in arguments, those of packed sequences too."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in leaves_of(item)]
    if isinstance(value, dict):
        return [t for item in value.values() for t in leaves_of(item)]
    return [value] if isinstance(value, Tensor) else []


def fresh(value: Any, widen: bool = False) -> Any:
    """Arguments with leaves of their own, in float64 where asked for."""

    def copied(tensor: Tensor) -> Tensor:
        leaf = tensor.detach().clone()
        return (leaf.double() if widen and leaf.is_floating_point() else leaf).requires_grad_(tensor.requires_grad)

    if isinstance(value, PackedSequence):
        return PackedSequence(copied(value.data), *value[1:])
    if isinstance(value, (tuple, list)):
        return type(value)(fresh(item, widen) for item in value)
    if isinstance(value, dict):
        return {key: fresh(item, widen) for key, item in value.items()}
    return copied(value) if isinstance(value, Tensor) else value


@dataclass
class Sample:
    """One entry of the database: how to build the module and what to call it with."""

    number: int
    source: ModuleInput

    def __str__(self) -> str:
        constructor = self.source.constructor_input
        return f"sample {self.number} {self.source.desc}: {constructor.args} {constructor.kwargs}"

    def build(self, module_class: type[torch.nn.Module], dtype: torch.dtype, training: bool) -> torch.nn.Module:
        constructor = self.source.constructor_input
        arguments, keywords = copy.deepcopy((constructor.args, constructor.kwargs))
        return module_class(*arguments, **keywords).to(dtype).train(training)

    def run(self, module: torch.nn.Module, dtype: torch.dtype, widen: bool = False) -> list[Tensor | None]:
        """Outputs, gradients of inputs and parameters for seeds that `dtype` holds, and the state afterwards."""
        forward = self.source.forward_input
        arguments, keywords = fresh(forward.args, widen), fresh(forward.kwargs, widen)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            outputs = leaves_of(module(*arguments, **keywords))
        sources = [t for t in [*leaves_of([arguments, keywords]), *module.parameters()] if t.requires_grad]
        chosen = [o for o in outputs if o.requires_grad]
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in chosen]
        seeds = [seed.to(dtype).to(o.dtype) for seed, o in zip(seeds, chosen, strict=True)]
        grads = torch.autograd.grad(chosen, sources, seeds, allow_unused=True) if chosen and sources else ()
        return [t if t is None else t.detach() for t in (*outputs, *grads, *module.state_dict().values())]


def samples(entry: ModuleInfoEntry, dtype: torch.dtype, training: bool) -> Iterator[Sample]:
    info = MODULES[entry.torch_name]
    torch.manual_seed(0)
    inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    yield from (Sample(number, source) for number, source in enumerate(inputs))


def pair(
    entry: ModuleInfoEntry, sample: Sample, dtype: torch.dtype, training: bool
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A module of each kind with the same state."""
    theirs = sample.build(MODULES[entry.torch_name].module_cls, dtype, training)
    ours = sample.build(entry.module, dtype, training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@modes
@entries
def test_every_sample_gives_what_torch_gives(entry: ModuleInfoEntry, dtype: torch.dtype, training: bool) -> None:
    if dtype not in MODULES[entry.torch_name].dtypes:
        pytest.skip(f"torch lists no {dtype} samples of {entry.torch_name}")
    for sample in samples(entry, dtype, training):
        ours, theirs = pair(entry, sample, dtype, training)
        # Every type is held to the float64 result: torch's own in `dtype` may be further off than the tolerance.
        if dtype in (torch.bfloat16, torch.float16) and hasattr(theirs, "options"):
            theirs.options = None  # torch cuts logits into chunks in half types only
        expected = sample.run(theirs.double(), dtype, widen=True)
        actual = sample.run(ours, dtype)
        expected = [e if e is None else e.to(a.dtype) for a, e in zip(actual, expected, strict=True)]
        torch.testing.assert_close(
            actual, expected, equal_nan=True, msg=lambda text, sample=sample: f"{sample}\n{text}"
        )


@modes
@entries
def test_state_moves_strictly_in_both_directions(entry: ModuleInfoEntry, training: bool) -> None:
    for sample in samples(entry, torch.float32, training):
        ours, theirs = pair(entry, sample, torch.float32, training)
        assert isinstance(ours, type(theirs))
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.add_(1)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b)


@entries
def test_prints_like_torch_s_module(entry: ModuleInfoEntry) -> None:
    for sample in samples(entry, torch.float32, True):
        ours, theirs = pair(entry, sample, torch.float32, True)
        assert type(ours).__name__ == type(theirs).__name__
        assert repr(ours) == repr(theirs)


def saved_and_loaded(module: torch.nn.Module) -> torch.nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
@entries
def test_copies_compute_the_same(entry: ModuleInfoEntry, how: str) -> None:
    for sample in samples(entry, torch.float32, False):
        ours = sample.build(entry.module, torch.float32, False)
        duplicate = COPIES[how](ours)
        assert type(duplicate) is entry.module
        assert all(a is not b for a, b in zip(ours.parameters(), duplicate.parameters(), strict=True))
        torch.testing.assert_close(
            sample.run(duplicate, torch.float32), sample.run(ours, torch.float32), rtol=0, atol=0, equal_nan=True
        )


@entries
def test_modules_load_only_what_fits(entry: ModuleInfoEntry) -> None:
    for sample in samples(entry, torch.float32, True):
        ours = sample.build(entry.module, torch.float32, True)
        with pytest.raises(RuntimeError, match="Unexpected key"):
            ours.load_state_dict({**ours.state_dict(), "stray": torch.ones(1)}, strict=True)


@entries
def test_every_error_input_raises_what_torch_raises(entry: ModuleInfoEntry) -> None:
    info = MODULES[entry.torch_name]
    if info.module_error_inputs_func is None:
        pytest.skip(f"torch lists no error inputs for {entry.torch_name}")
    errors: list[ErrorModuleInput] = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    for number, error in enumerate(errors):
        constructor = error.module_error_input.constructor_input
        forward = error.module_error_input.forward_input
        fails_at_call = error.error_on == ModuleErrorEnum.FORWARD_ERROR
        module = entry.module(*constructor.args, **constructor.kwargs) if fails_at_call else entry.module
        wrong = forward if fails_at_call else constructor
        with pytest.raises(error.error_type) as raised:
            module(*wrong.args, **wrong.kwargs)
        assert re.search(error.error_regex, str(raised.value)), f"error input {number}"
