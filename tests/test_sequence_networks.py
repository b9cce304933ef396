"""What holds for every network that writes sequences: as on torch's layers, causal, its loss that of its logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlkernels import nn

from .cases.networks import compare_with_torch
from .cases.sequences import PADDING, VOCABULARY, WRITERS, Writer, logits_of


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """So small networks gain nothing from more, and the test processes share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(params=WRITERS)
def writer(request: pytest.FixtureRequest) -> Writer:
    return WRITERS[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_as_on_torchs_layers(writer: Writer, dtype: torch.dtype) -> None:
    context = writer.context_as(dtype)

    def call(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
        return logits_of(model, context, writer.sequences[:, :-1]), model.loss(*context, *writer.loss_arguments())

    compare_with_torch(lambda layers: writer.build(layers=layers), call, dtype)


def test_the_loss_is_the_mean_over_what_is_no_padding(writer: Writer) -> None:
    model = writer.trained(torch.float64)
    context = writer.context_as(torch.float64)
    log_probabilities = logits_of(model, context, writer.sequences[:, :-1]).log_softmax(-1)
    targets = writer.sequences[:, 1:]
    expected = -log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)[targets != PADDING].mean()
    torch.testing.assert_close(model.loss(*context, *writer.loss_arguments()), expected, rtol=0, atol=1e-12)


def test_the_loss_makes_no_logits(writer: Writer) -> None:
    model = writer.trained()

    def fail(module: torch.nn.Module, *_: object) -> None:
        raise AssertionError(f"{module} was called")

    (output,) = [
        module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == VOCABULARY
    ]
    output.register_forward_hook(fail)
    model.loss(*writer.context, *writer.loss_arguments()).backward()
    with pytest.raises(AssertionError, match="was called"):
        logits_of(model, writer.context, writer.sequences[:, :-1])


def test_later_tokens_get_exactly_zero_gradient(writer: Writer) -> None:
    model = writer.trained()
    embedded = []

    def as_leaf(_module: torch.nn.Module, _inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    model.get_submodule(writer.embedding).register_forward_hook(as_leaf)
    tokens = torch.randint(3, VOCABULARY, (3, 6))
    logits = logits_of(model, writer.context, tokens)
    for position in range(tokens.shape[1]):
        (gradient,) = torch.autograd.grad(logits[:, position].square().sum(), embedded[0], retain_graph=True)
        assert torch.equal(gradient[:, position + 1 :], torch.zeros_like(gradient[:, position + 1 :]))
        assert bool((gradient[:, : position + 1].abs().sum(-1) > 0).all())


def test_padding_changes_nothing(writer: Writer) -> None:
    model = writer.trained(torch.float64)
    context = writer.context_as(torch.float64)

    def more(x: Tensor) -> Tensor:
        return x if x.is_floating_point() else torch.nn.functional.pad(x, (0, 2), value=PADDING)

    loss = model.loss(*context, *writer.loss_arguments())
    padded_loss = model.loss(*map(more, (*context, *writer.loss_arguments())))
    torch.testing.assert_close(padded_loss, loss, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, writer in WRITERS.items() if writer.context])
def test_sequences_without_a_token_to_predict_are_refused(name: str) -> None:
    writer = WRITERS[name]
    with pytest.raises(ValueError, match=r"sequences must be \[N, T\] with a start and an end symbol, got .*\[3, 1\]"):
        writer.build().loss(*writer.context, writer.sequences[:, :1])


@pytest.mark.parametrize("name", ["char_lm_lstm", "gpt"])
def test_targets_of_another_shape_are_refused(name: str) -> None:
    model, tokens = WRITERS[name].build(), torch.ones(3, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"targets must be shaped as the tokens, \[3, 6\], got \[3, 5\]"):
        model.loss(tokens, tokens[:, 1:])
