"""The same bits from every run, number of threads, Python thread and forked child; NaN and Inf where torch has them."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import threading

import numpy as np
import pytest
import torch

from .cases import Case, all_cases, call, gradients, random_like


def run(case: Case, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    sample = case.build(dtype).requiring_grad()
    outputs = call(case.function, sample)
    return [*(o.detach() for o in outputs), *gradients(outputs, sample)]


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_bits_do_not_depend_on_the_run_or_the_number_of_threads(case: Case, isa: str, threads: None) -> None:
    expected = run(case)
    for count in (2,) if isa == "simt" else (1, 2, 3, 5):  # the simulator runs blocks one after the other
        torch.set_num_threads(count)
        assert same_bits(run(case), expected), f"{count} threads"


def test_python_threads_do_not_disturb_each_other() -> None:
    cases = all_cases()
    expected = {str(case): run(case) for case in cases}
    failures: list[str] = []

    def work(start: int) -> None:
        for step in range(2 * len(cases)):
            case = cases[(start + step) % len(cases)]
            if not same_bits(run(case), expected[str(case)]):
                failures.append(str(case))

    workers = [threading.Thread(target=work, args=(3 * i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_a_forked_child_computes_the_same() -> None:
    """After torch's pool has run in the parent, torch's own parallel operators hang in the child; ours must not.

    Forward alone: torch's autograd refuses to run in a child of a process that has used it.
    """
    work = [(case, case.build(torch.float32)) for case in all_cases()]
    expected = [[o.numpy() for o in call(case.function, sample)] for case, sample in work]

    def in_child(connection: multiprocessing.connection.Connection) -> None:
        connection.send([[o.numpy() for o in call(case.function, sample)] for case, sample in work])

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=in_child, args=(sender,), daemon=True)
    child.start()
    answered = receiver.poll(60)
    if not answered:
        child.kill()
    assert answered, "the forked child did not answer"
    for actual, wanted in zip(receiver.recv(), expected, strict=True):
        for a, w in zip(actual, wanted, strict=True):
            np.testing.assert_array_equal(a, w)
    child.join()


def torch_multiplies_padding(case: Case) -> bool:
    """Whether torch's kernel for the case makes NaN of a weight that is not finite where it meets padding: for a single
    row it does on processors without AVX-512."""
    return str(case) == "conv2d-one_row" and "512" not in torch.backends.cpu.get_cpu_capability()


# Minutes of the simulator; their blocks are those of smaller cases, and a NaN goes wherever an infinity would.
LONG_IN_THE_SIMULATOR = ("attention-long", "attention-long_causal", "attention-long_float_mask")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("case", [c for c in all_cases() if c.same_nonfinite], ids=str)
def test_nan_and_inf_appear_where_torch_has_them(case: Case, value: float, isa: str) -> None:
    if isa == "simt" and math.isinf(value) and str(case) in LONG_IN_THE_SIMULATOR:
        pytest.skip("minutes of the simulator: NaN alone")
    for position in case.build(torch.float32).differentiable():
        if math.isinf(value) and case.infinite_arguments is not None and position not in case.infinite_arguments:
            continue
        sample = case.build(torch.float32)
        flat = sample.args[position].view(-1)
        flat[flat.numel() // 2] = value
        ours, theirs = sample.requiring_grad(), sample.requiring_grad()
        our_outputs, their_outputs = call(case.function, ours), call(case.reference, theirs)
        pairs = [*zip(our_outputs, their_outputs, strict=True)]
        pairs += zip(gradients(our_outputs, ours), gradients(their_outputs, theirs), strict=True)
        for index, (a, b) in enumerate(pairs):
            where = f"argument {position}, result {index}"
            if case.column == "conv2d" and isa in ("simt", "cuda"):  # they multiply the padding, as cuDNN does
                assert not a[~b.isfinite()].isfinite().any(), where
                continue
            if torch_multiplies_padding(case):
                assert a[b.isfinite()].isfinite().all(), where
                continue
            assert torch.equal(a.isnan(), b.isnan()), where
            assert torch.equal(a.isposinf(), b.isposinf()) and torch.equal(a.isneginf(), b.isneginf()), where


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("case", [c for c in all_cases() if c.same_nonfinite], ids=str)
def test_nan_and_inf_of_the_incoming_gradient_reach_what_they_reach_in_torch(case: Case, value: float) -> None:
    sample = case.build(torch.float32)
    results = []
    for function in (case.function, case.reference):
        leaves = sample.requiring_grad()
        outputs = call(function, leaves)
        grads = random_like([o for o in outputs if o.requires_grad])
        for grad in grads:
            flat = grad.view(-1)
            flat[flat.numel() // 2] = value
        results.append(gradients(outputs, leaves, grads))
    for index, (a, b) in enumerate(zip(*results, strict=True)):
        assert a[b.isfinite()].isfinite().all(), f"gradient {index}"
        if case.column != "conv2d":  # some of torch's paths multiply it by the padding, see test_conv2d.py
            assert torch.equal(a.isfinite(), b.isfinite()), f"gradient {index}"
