"""Existing models on the kernels: what ``convert`` exchanges, what it keeps, and how it is undone."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize, prune

import dlkernels
from dlkernels import nn

from .cases import outputs_of


def fresh(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def results(model: torch.nn.Module, *inputs: Any, **keywords: Any) -> list[Tensor]:
    """Outputs, then gradients of inputs and parameters, of a double-precision model."""
    torch.manual_seed(1)
    outputs = outputs_of(model(*inputs, **keywords))
    leaves = [t for t in [*inputs, *model.parameters()] if isinstance(t, Tensor) and t.requires_grad]
    chosen = [o for o in outputs if o.requires_grad]
    cotangents = [torch.randn_like(o) for o in chosen]
    gradients = torch.autograd.grad(chosen, leaves, cotangents, allow_unused=True, materialize_grads=True)
    return [*outputs, *gradients]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def operators_of(program: Callable[[], object]) -> set[str]:
    """Names of the operators that ran."""
    with torch.profiler.profile() as profile:
        program()
    return {event.key for event in profile.key_averages()}


def small_network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(36, 5)
    ).double()


IMAGES = (2, 3, 5, 5)
LABELS = torch.tensor([1, 0])

MODULES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[Any, ...]]] = {
    "Conv2d": (lambda: torch.nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"), (fresh(IMAGES),)),
    "BatchNorm1d": (lambda: torch.nn.BatchNorm1d(3), (fresh((5, 3)),)),
    "BatchNorm2d": (lambda: torch.nn.BatchNorm2d(3, affine=False), (fresh(IMAGES),)),
    "BatchNorm3d": (lambda: torch.nn.BatchNorm3d(3, momentum=None), (fresh((2, 3, 4, 4, 4)),)),
    "Linear": (lambda: torch.nn.Linear(3, 4), (fresh((2, 5, 3)),)),
    "LSTM": (lambda: torch.nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True), (fresh((2, 5, 3)),)),
    "LSTMCell": (lambda: torch.nn.LSTMCell(3, 4), (fresh((2, 3)),)),
    "CrossEntropyLoss": (lambda: torch.nn.CrossEntropyLoss(label_smoothing=0.1), (fresh((2, 3)), LABELS)),
    "MultiheadAttention": (lambda: torch.nn.MultiheadAttention(8, 2), (fresh((4, 2, 8)),) * 3),
    "TransformerEncoderLayer": (lambda: torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0), (fresh((4, 2, 8)),)),
    "TransformerDecoderLayer": (lambda: torch.nn.TransformerDecoderLayer(8, 2, 16, 0.0), (fresh((4, 2, 8)),) * 2),
    "Sequential": (small_network, (fresh(IMAGES),)),
}
if hasattr(torch.nn, "LinearCrossEntropyLoss"):
    MODULES["LinearCrossEntropyLoss"] = (lambda: torch.nn.LinearCrossEntropyLoss(3, 4), (fresh((2, 3)), LABELS))


@pytest.mark.parametrize("name", MODULES)
def test_a_module_computes_the_same_on_the_kernels_and_back(name: str) -> None:
    build, inputs = MODULES[name]
    torch.manual_seed(0)
    model = build().double()
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    parameters = list(model.parameters())
    expected = results(copy.deepcopy(model), *inputs)

    assert dlkernels.convert(model) is model
    assert dlkernels.convert(model) is model
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert isinstance(model, build().__class__)
    converted = copy.deepcopy(model)
    assert_same(results(converted, *inputs), expected)
    used = operators_of(lambda: converted(*inputs))
    assert any(operator.startswith("dlkernels::") for operator in used)

    assert dlkernels.revert(model) is model
    for module, kind, attributes in before:
        assert type(module) is kind and dict(vars(module)) == attributes


def test_ops_and_skip_choose() -> None:
    def kinds(**arguments: Any) -> list[bool]:
        model = torch.nn.ModuleDict({"stem": small_network(), "head": torch.nn.Sequential(torch.nn.Linear(3, 4))})
        dlkernels.convert(model, **arguments)
        return [
            isinstance(model.get_submodule(name), ours)
            for name, ours in (("stem.0", nn.Conv2d), ("stem.1", nn.BatchNorm2d), ("stem.4", nn.Linear))
        ] + [isinstance(model["head"][0], nn.Linear)]

    assert kinds() == [True, True, True, True]
    assert kinds(ops=["conv2d", "linear"]) == [True, False, True, True]
    assert kinds(skip=["stem.1", "head"]) == [True, False, True, False]
    assert kinds(skip=(torch.nn.Linear, torch.nn.Conv2d)) == [False, True, False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ["convolution"]}, "ops names 'convolution', expected some of conv2d"),
        ({"ops": "conv2d"}, "ops must be a sequence of names, got the string 'conv2d'"),
        ({"skip": ["head", "0", "tail"]}, "skip names 'head', 'tail': the model has no such module"),
        ({"skip": "0"}, "skip must be a sequence of names and classes, got '0'"),
        ({"skip": torch.nn.Linear}, "skip must be a sequence of names and classes"),
    ],
)
def test_a_wrong_choice_is_refused_before_anything_changes(arguments: dict[str, Any], message: str) -> None:
    model = small_network()
    with pytest.raises(ValueError, match=message):
        dlkernels.convert(model, **arguments)
    assert type(model[0]) is torch.nn.Conv2d


def test_other_instances_and_classes_are_not_touched() -> None:
    model, other = small_network(), small_network()
    dlkernels.convert(model)
    assert type(other[0]) is torch.nn.Conv2d and type(small_network()[0]) is torch.nn.Conv2d


def test_revert_leaves_modules_that_were_built_so() -> None:
    model = torch.nn.Sequential(nn.Linear(3, 4), torch.nn.Linear(4, 5))
    dlkernels.revert(dlkernels.convert(model))
    assert [type(module) for module in model] == [nn.Linear, torch.nn.Linear]


def test_shared_modules_stay_shared() -> None:
    layer = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(layer, torch.nn.Tanh(), layer)
    dlkernels.convert(model)
    assert model[0] is model[2] is layer and type(layer) is nn.Linear
    dlkernels.revert(model)
    assert type(layer) is torch.nn.Linear


def test_an_optimizer_made_before_trains_the_converted_model() -> None:
    losses = []
    for change in (lambda model: model, dlkernels.convert):
        model = small_network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        change(model)
        for _ in range(3):
            loss = torch.nn.functional.cross_entropy(model(fresh(IMAGES)), LABELS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)


# ---- hooks, and what changes a weight before it is used --------------------------------------------------------------


def test_hooks_are_kept_and_see_every_call() -> None:
    model = small_network()
    seen: list[str] = []
    for name, module in model.named_children():
        module.register_forward_pre_hook(lambda module, inputs, name=name: seen.append(f"before {name}"))
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.append(f"after {name}"))
        module.register_full_backward_hook(lambda module, grads, _, name=name: seen.append(f"backward {name}"))
    x = fresh(IMAGES)
    expected = results(model, x)
    expected_calls, seen[:] = list(seen), []
    assert_same(results(dlkernels.convert(model), x), expected)
    assert seen == expected_calls


def test_a_hook_on_all_modules_sees_the_relu_after_a_norm() -> None:
    model = dlkernels.convert(small_network())
    seen: list[type] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    model(fresh(IMAGES))
    handle.remove()
    assert torch.nn.ReLU in seen


def test_a_norm_and_the_relu_after_it_are_one_kernel() -> None:
    model = dlkernels.convert(small_network())
    assert "aten::relu" not in operators_of(lambda: model(fresh(IMAGES)))
    assert "aten::relu" in operators_of(lambda: dlkernels.revert(model)(fresh(IMAGES)))


def test_a_module_with_a_forward_of_its_own_is_left() -> None:
    model = small_network()
    plain = model[1].forward
    model[1].forward = lambda x: plain(x) + 1  # as libraries do that move weights between devices
    model[4].forward = lambda x: x
    expected = results(model, fresh(IMAGES))
    assert_same(results(dlkernels.convert(model), fresh(IMAGES)), expected)
    left = {row.name: row.left for row in dlkernels.report(model) if row.left}
    assert left == dict.fromkeys(("1", "4"), "its forward was replaced on the instance")


PARAMETRIZE: dict[str, Callable[[torch.nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "two": lambda layer: parametrize.register_parametrization(
        parametrizations.orthogonal(layer), "weight", torch.nn.Tanh()
    ),
}


@pytest.mark.parametrize("kind", PARAMETRIZE)
def test_parametrisations_are_kept(kind: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)).double()
    PARAMETRIZE[kind](model[0])
    twin = copy.deepcopy(model)  # which shares the class that torch made
    x = fresh((5, 4))
    expected = results(copy.deepcopy(twin).eval(), x)
    parametrized_class = type(model[0])

    dlkernels.convert(model).eval()
    assert isinstance(model[0], nn.Linear) and type(twin[0]) is parametrized_class
    assert not isinstance(twin[0], nn.Linear)
    assert_same(results(copy.deepcopy(model), x), expected)
    assert "dlkernels::linear" in operators_of(lambda: model(x))
    assert dlkernels.report(model)[0].left is None

    restored = dlkernels.revert(copy.deepcopy(model))
    assert type(restored[0]).__bases__ == (torch.nn.Linear,)
    assert type(restored[0]).__name__ == parametrized_class.__name__
    assert_same(results(restored, x), expected)

    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected[0])
    parametrizations.weight_norm(model[0])
    torch.testing.assert_close(dlkernels.revert(model)(x), expected[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        lambda layer: prune.random_unstructured(layer, "weight", amount=0.5),
    ],
    ids=["weight_norm", "spectral_norm", "prune"],
)
def test_hooks_that_compute_the_weight_are_kept(change: Callable[[torch.nn.Module], Any]) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).double()
    change(model[0])
    model.eval()
    expected = results(model, fresh(IMAGES))
    assert_same(results(dlkernels.convert(model), fresh(IMAGES)), expected)
    assert type(model[0]) is nn.Conv2d


def test_a_pruned_weight_is_still_masked_after_a_step() -> None:
    model = dlkernels.convert(torch.nn.Sequential(torch.nn.Linear(8, 8)))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    model(torch.ones(2, 8)).sum().backward()
    assert int((model[0].weight == 0).sum()) == 32
    assert torch.equal(model[0].weight_orig.grad == 0, model[0].weight_mask == 0)


# ---- what is left, and why -------------------------------------------------------------------------------------------


class ScaledLinear(torch.nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class LowRank(torch.nn.Module):
    """An adapter around a layer, as of LoRA."""

    def __init__(self, base_layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = torch.nn.Linear(base_layer.in_features, 1, bias=False)
        self.up = torch.nn.Linear(1, base_layer.out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return self.base_layer(input) + self.up(self.down(input))


def test_an_adapter_stays_and_its_layers_are_converted() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(LowRank(torch.nn.Linear(4, 3))).double()
    expected = results(model, fresh((5, 4)))
    assert_same(results(dlkernels.convert(model), fresh((5, 4))), expected)
    assert type(model[0]) is LowRank and type(model[0].base_layer) is nn.Linear


LEFT: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "subclass": (lambda: ScaledLinear(3, 4), "a subclass of Linear, which may compute something else"),
    "SyncBatchNorm": (lambda: torch.nn.SyncBatchNorm(3), "synchronises its statistics between processes"),
    "LazyLinear": (lambda: torch.nn.LazyLinear(3), "has no parameters yet: call the model once, then convert"),
    "Conv1d": (lambda: torch.nn.Conv1d(3, 4, 1), "not one of the operations"),
    "Conv3d": (lambda: torch.nn.Conv3d(3, 4, 1), "not one of the operations"),
    "ConvTranspose2d": (lambda: torch.nn.ConvTranspose2d(3, 4, 1), "not one of the operations"),
    "GRU": (lambda: torch.nn.GRU(3, 4), "not one of the operations"),
    "quantized": (lambda: torch.ao.nn.quantized.Conv2d(3, 4, 1), "quantized"),
    "quantization-aware": (
        lambda: torch.ao.nn.qat.Linear(3, 4, qconfig=torch.ao.quantization.default_qconfig),
        "quantized",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_is_reported_with_the_reason(kind: str) -> None:
    build, reason = LEFT[kind]
    model = torch.nn.Sequential(build(), torch.nn.ReLU())
    before = type(model[0])
    dlkernels.convert(model)
    assert type(model[0]) is before
    [row] = dlkernels.report(model)
    assert (row.name, row.left) == ("0", reason)


def test_the_report_counts_and_prints() -> None:
    model = torch.nn.ModuleDict({"encoder": small_network(), "time": torch.nn.Conv1d(3, 4, 1)})
    assert [row.left for row in dlkernels.report(model)][:3] == ["convert() was not asked to take it"] * 3
    dlkernels.convert(model, skip=["encoder.1"])
    assert str(dlkernels.report(model)).splitlines() == [
        "2 of 4 modules run on dlkernels: Conv2d 1, Linear 1",
        "encoder.1  BatchNorm2d  convert() was not asked to take it",
        "time       Conv1d       not one of the operations",
        "code that compares classes exactly (type(m) is nn.Linear, torch.ao.quantization) does not find these modules",
    ]
    assert str(dlkernels.report(torch.nn.ReLU())) == "0 of 0 modules run on dlkernels"


def test_a_lazy_layer_is_converted_once_it_has_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.LazyLinear(3))
    dlkernels.convert(model)(torch.ones(2, 4))
    assert type(model[0]) is torch.nn.Linear
    assert type(dlkernels.convert(model)[0]) is nn.Linear


def test_synchronised_batch_norm_is_made_of_a_converted_model_without_loss() -> None:
    def synchronised(model: torch.nn.Module) -> torch.nn.Module:
        torch.manual_seed(0)
        with torch.no_grad():
            for tensor in (*model[1].parameters(), model[1].running_mean):
                tensor.normal_()
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.eval())

    plain = small_network()
    plain[1] = torch.nn.BatchNorm2d(4, 1e-3, 0.2).double()
    expected, actual = synchronised(copy.deepcopy(plain)), synchronised(dlkernels.convert(plain))
    assert type(actual[1]) is torch.nn.SyncBatchNorm and actual[1].weight is plain[1].weight
    assert repr(actual[1]) == repr(expected[1]) and vars(actual[1]).keys() == vars(expected[1]).keys()
    assert_same(list(actual.state_dict().values()), list(expected.state_dict().values()))
    assert_same(results(actual, fresh(IMAGES)), results(expected, fresh(IMAGES)))


# ---- fused inference -------------------------------------------------------------------------------------------------


def encoder(nested: bool = False) -> torch.nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).double().eval()


def test_inference_of_an_encoder_runs_here() -> None:
    x = fresh((3, 5, 8)).detach()
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    with torch.no_grad():
        expected = [encoder()(x), encoder()(x, mask, is_causal=True)]
        model = dlkernels.convert(encoder())
        assert_same([model(x), model(x, mask, is_causal=True)], expected)
        used = operators_of(lambda: model(x))
    assert {"dlkernels::linear", "dlkernels::attention"} <= used
    assert "aten::_transformer_encoder_layer_fwd" not in used


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_of_padded_batches_take_torchs_path() -> None:
    x = fresh((3, 5, 8)).detach()
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    with torch.no_grad():
        expected = encoder(nested=True)(x, src_key_padding_mask=padding)
        actual = dlkernels.convert(encoder(nested=True))(x, src_key_padding_mask=padding)
    assert_same([actual], [expected])


# ---- what is around it -----------------------------------------------------------------------------------------------


def test_copies_and_files_hold_the_converted_model() -> None:
    model = dlkernels.convert(small_network())
    x = fresh(IMAGES)
    expected = results(copy.deepcopy(model), x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = small_network()
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), dlkernels.convert(loaded)):
        assert type(copied[0]) is nn.Conv2d
        assert_same(results(copied, x), expected)
        assert type(dlkernels.revert(copied)[0]) is torch.nn.Conv2d


def test_transforms_of_functions_go_through_a_converted_model() -> None:
    plain = small_network().eval()
    model = dlkernels.convert(copy.deepcopy(plain))
    images, labels = fresh((4, 3, 5, 5)).detach(), torch.arange(4)
    state = {name: tensor.detach() for name, tensor in plain.state_dict().items()}

    def loss(model: torch.nn.Module) -> Callable[..., Tensor]:
        def of_one(state: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            logits = torch.func.functional_call(model, state, (image.unsqueeze(0),))
            return torch.nn.functional.cross_entropy(logits, label.unsqueeze(0))

        return of_one

    for transformed in (
        lambda f: torch.vmap(torch.func.grad(f, argnums=1), (None, 0, 0))(state, images, labels),
        lambda f: torch.func.jvp(lambda x: f(state, x, labels[0]), (images[0],), (images[1],)),
        lambda f: torch.func.hessian(lambda x: f(state, x.view(3, 5, 5), labels[0]))(images[0].flatten()),
    ):
        torch.testing.assert_close(transformed(loss(model)), transformed(loss(plain)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("checkpointed", ["reentrant", "non_reentrant"])
def test_activation_checkpointing(checkpointed: str) -> None:
    plain = small_network().eval()
    model = dlkernels.convert(copy.deepcopy(plain))
    x = fresh(IMAGES)
    expected = results(plain, x)
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=checkpointed == "reentrant")
    torch.manual_seed(1)
    y.backward(torch.randn_like(y))
    assert_same([y, *(p.grad for p in model.parameters())], [expected[0], *expected[2:]])


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile without what other tests compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class EveryModule(torch.nn.Module):
    """Each converted module that torch.compile traces, once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        self.encoder = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.cell = torch.nn.LSTMCell(8, 6)
        self.head = torch.nn.Linear(6, 5)
        self.loss = torch.nn.CrossEntropyLoss()

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        features = self.encoder(self.stem(images).flatten(2).transpose(1, 2))
        hidden, _ = self.cell(features.mean(1))
        return self.loss(self.head(hidden), labels)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_converted_model_compiles_whole_and_once(dynamic: bool, training: bool) -> None:
    torch.manual_seed(0)
    model = dlkernels.convert(EveryModule()).train(training)
    eager = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
    compiled_once = 0
    for n in (4, 6, 7) if dynamic else (4, 4, 4):
        batch = (torch.randn(n, 3, 8, 9, requires_grad=True), torch.arange(n) % 5)
        with torch.set_grad_enabled(training):
            if training:
                torch.testing.assert_close(results(compiled, *batch), results(eager, *batch))
            else:
                torch.testing.assert_close(compiled(*batch), eager(*batch))
        compiled_once = compiled_once or counter.frame_count
    assert counter.frame_count == compiled_once
    operators = {str(node.target) for node in counter.graphs[-1].graph.nodes}
    for name in ("conv2d", "batch_norm", "attention", "lstm_cell", "linear", "cross_entropy"):
        assert f"dlkernels.{name}.default" in operators


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_a_converted_model_exports(strict: bool) -> None:
    torch.manual_seed(0)
    model = dlkernels.convert(EveryModule()).eval()
    batch = (torch.randn(4, 3, 8, 9), torch.arange(4))
    shapes = ({0: torch.export.Dim("batch")}, {0: torch.export.Dim("batch")})
    program = torch.export.export(model, batch, dynamic_shapes=shapes, strict=strict)
    larger = (torch.randn(6, 3, 8, 9), torch.arange(6) % 5)
    torch.testing.assert_close(program.module()(*larger), model(*larger))
    assert any("dlkernels.conv2d" in str(node.target) for node in program.graph.nodes)


# ---- the command -----------------------------------------------------------------------------------------------------


class Lying(torch.nn.Conv2d):
    """A convolution whose copies compute something else, as a defect would."""

    def __deepcopy__(self, memo: Any) -> torch.nn.Module:
        return torch.nn.Conv2d(3, 4, 3)


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    cli = pytest.importorskip("dlkernels.cli", reason="the command line needs typer and rich")
    status = cli.run(["convert-check", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_reports_and_compares(capsys: pytest.CaptureFixture[str]) -> None:
    status, output, _ = command(capsys, "torch.nn:Identity", "--shape", "2,3")
    assert status == 0 and output.startswith("0 of 0 modules run on dlkernels")
    status, output, error = command(capsys, f"{__name__}:float_network", "--shape", "2,3,5,5")
    assert (status, error) == (0, "")
    first, warning, outputs, gradients = output.splitlines()
    assert first == "3 of 3 modules run on dlkernels: BatchNorm2d 1, Conv2d 1, Linear 1"
    assert warning.startswith("code that compares classes exactly")
    assert outputs.startswith("outputs: 1, largest difference ") and gradients.startswith("gradients: 7, largest ")


def float_network() -> torch.nn.Module:
    return small_network().float()


def lying_network() -> torch.nn.Module:
    return torch.nn.Sequential(Lying(3, 4, 3))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("lying_network", "2,3,5,5"), 1, "outputs and gradients differ by more than 1e-03"),
        (("no_network", "2,3,5,5"), 2, "has no attribute 'no_network'"),
        (("float_network", "2,4,5,5"), 2, "Invalid value for --shape: the model refuses it: "),
        (("float_network", "2,x"), 2, "must be positive integers with commas, got 2,x"),
        (("IMAGES", "2,3"), 2, "is not callable"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: tuple[str, str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, shape = arguments
    actual, _, error = command(capsys, f"{__name__}:{name}", "--shape", shape)
    assert actual == status and message in error
