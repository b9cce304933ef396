"""Models and trainers that this project did not write, on the kernels: same outputs, gradients and training.

Their libraries are optional; a test whose library is missing is skipped with its name.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.nn import functional as F

import dlkernels
from dlkernels import functional, nn

from .cases.reference import import_torchvision

os.environ["HF_HUB_OFFLINE"] = "1"

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0))
PADDING = (torch.arange(7) < torch.tensor([[7], [4]])).long()
LABELS = torch.tensor([1, 0])


def import_library(name: str) -> ModuleType:
    """The library, or skips the test that asks. Many import torchvision, which needs help to load: it goes first."""
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
    return pytest.importorskip(name, reason=f"{name.partition('.')[0]} is not installed")


# ---- models ----------------------------------------------------------------------------------------------------------


def resnet() -> torch.nn.Module:
    models = import_torchvision().models.resnet
    return models.ResNet(models.Bottleneck, [1, 1, 1, 1], num_classes=5)


def timm_model(name: str, **arguments: Any) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        return import_library("timm").create_model(name, num_classes=5, **arguments)

    return build


TINY = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def bert(attention: str) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        transformers = import_library("transformers")
        config = transformers.BertConfig(
            vocab_size=50, max_position_embeddings=16, problem_type="single_label_classification", **TINY
        )
        config._attn_implementation = attention
        return transformers.BertForSequenceClassification(config)

    return build


def gpt2() -> torch.nn.Module:
    transformers = import_library("transformers")
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def vit() -> torch.nn.Module:
    transformers = import_library("transformers")
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=32, patch_size=8, num_labels=3, **TINY)
    )


def image_loss(model: torch.nn.Module) -> Tensor:
    return F.cross_entropy(model(IMAGES), LABELS)


def bert_loss(model: torch.nn.Module) -> Tensor:
    return model(input_ids=TOKENS, attention_mask=PADDING, labels=LABELS).loss


def gpt2_loss(model: torch.nn.Module) -> Tensor:
    logits = model(input_ids=TOKENS).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def vit_loss(model: torch.nn.Module) -> Tensor:
    return model(pixel_values=IMAGES, labels=LABELS).loss


# Under override: calls of each operation. After convert: modules that run here, and that are left.
MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor], dict[str, int], tuple[int, int]]] = {
    "torchvision resnet": (resnet, image_loss, {"conv2d": 17, "batch_norm": 17, "linear": 1}, (35, 0)),
    "timm resnet": (timm_model("test_resnet"), image_loss, {"conv2d": 15, "batch_norm": 15, "linear": 1}, (31, 0)),
    "timm efficientnet": (
        timm_model("test_efficientnet"),
        image_loss,
        {"conv2d": 17, "batch_norm": 13, "linear": 1},
        (18, 13),  # its norms are a subclass
    ),
    "timm vit": (
        timm_model("test_vit", img_size=32),
        image_loss,
        {"conv2d": 1, "linear": 25, "attention": 6},
        (26, 0),
    ),
    "transformers bert": (bert("sdpa"), bert_loss, {"linear": 14, "attention": 2}, (14, 0)),
    "transformers bert, attention written out": (bert("eager"), bert_loss, {"linear": 14}, (14, 0)),
    "transformers gpt2": (gpt2, gpt2_loss, {"linear": 9, "attention": 2}, (1, 0)),
    "transformers vit": (vit, vit_loss, {"conv2d": 1, "linear": 13, "attention": 2}, (14, 0)),
}


def training_results(model: torch.nn.Module, loss_of: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Loss, gradients of the parameters, and buffers after one step's forward and backward pass."""
    torch.manual_seed(1)
    loss = loss_of(model)
    loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | gradients | dict(model.named_buffers())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Equal but for rounding: a gradient that is zero but for rounding is held to the largest of all."""
    assert actual.keys() == expected.keys()
    floor = 1e-2 * max(float(t.abs().max()) for name, t in expected.items() if name.startswith("gradient"))
    for name, tensor in expected.items():
        scale = max(float(tensor.abs().max()), floor)
        torch.testing.assert_close(
            actual[name], tensor, rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_models_train_the_same_under_override_and_after_convert(name: str) -> None:
    build, loss_of, calls, (here, left) = MODELS[name]
    torch.manual_seed(0)
    model = build().double().train()
    expected = training_results(copy.deepcopy(model), loss_of)
    with dlkernels.override() as log:
        assert_same(training_results(copy.deepcopy(model), loss_of), expected)
    assert (log.calls, log.fallbacks) == ({**calls, "cross_entropy": 1}, [])
    converted = dlkernels.convert(copy.deepcopy(model))
    assert_same(training_results(converted, loss_of), expected)
    rows = dlkernels.report(converted)
    assert (sum(row.left is None for row in rows), sum(row.left is not None for row in rows)) == (here, left)
    with torch.no_grad():
        expected_loss = loss_of(dlkernels.revert(copy.deepcopy(converted)).eval())
        torch.testing.assert_close(loss_of(converted.eval()), expected_loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [("torchvision resnet", False), ("timm vit", True), ("transformers bert", False), ("transformers gpt2", True)],
)
def test_converted_models_compile_whole_and_once(name: str, dynamic: bool) -> None:
    build, loss_of, _, _ = MODELS[name]
    torch.manual_seed(0)
    model = dlkernels.convert(build()).double().train()
    expected = training_results(copy.deepcopy(model), loss_of)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=dynamic, backend=counter)
    assert_same(training_results(model, lambda model: compiled(model)), expected)
    frames = counter.frame_count
    compiled(model)
    torch._dynamo.reset()
    assert counter.frame_count == frames


def test_an_adapter_of_peft_stays_and_its_layers_are_converted() -> None:
    peft = import_library("peft")
    torch.manual_seed(0)
    model = bert("sdpa")()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], lora_dropout=0.0)).double()
    expected = training_results(copy.deepcopy(model), bert_loss)
    converted = dlkernels.convert(copy.deepcopy(model))
    assert_same(training_results(converted, bert_loss), expected)
    kinds = {type(module) for module in converted.modules()}
    assert peft.tuners.lora.layer.Linear in kinds and torch.nn.Linear not in kinds


# ---- attribution -----------------------------------------------------------------------------------------------------

ATTRIBUTIONS: dict[str, dict[str, Any]] = {
    "Saliency": {},
    "IntegratedGradients": {"n_steps": 5},
    "DeepLift": {},
    "GuidedBackprop": {},
}


@pytest.mark.filterwarnings("ignore:Setting (forward, )?backward hooks on ReLU:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks and attributes:UserWarning")
@pytest.mark.parametrize("method", ATTRIBUTIONS)
def test_captum_attributes_the_same_through_a_converted_model(method: str) -> None:
    attribution = getattr(import_library("captum.attr"), method)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(3600, 5)
    )
    model.double().eval()[1].running_mean.normal_()
    x = IMAGES.clone().requires_grad_()
    expected = attribution(model).attribute(x, target=1, **ATTRIBUTIONS[method])
    actual = attribution(dlkernels.convert(model)).attribute(x, target=1, **ATTRIBUTIONS[method])
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert bool(expected.any())


# ---- trainers --------------------------------------------------------------------------------------------------------


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 16, 16, generator=generator), torch.tensor(label)) for label in (0, 1, 2, 1)]


def image_network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(784, 3)
    )


def train_with_lightning(change: Callable[[torch.nn.Module], Any], folder: Path) -> torch.nn.Module:
    lightning = import_library("pytorch_lightning")

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = image_network()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    task = Task()
    change(task)
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(task, torch.utils.data.DataLoader(batches(), batch_size=2))
    assert trainer.global_step == 2
    return task.model


def train_with_transformers(change: Callable[[torch.nn.Module], Any], folder: Path) -> torch.nn.Module:
    transformers = import_library("transformers")
    import_library("accelerate")
    torch.manual_seed(0)
    model = bert("sdpa")()
    change(model)
    rows = [{"input_ids": TOKENS[i % 2], "labels": LABELS[i % 2]} for i in range(4)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 2
    return model


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("train", [train_with_lightning, train_with_transformers])
def test_trainers_run_two_steps_to_the_same_parameters(train: Callable[..., torch.nn.Module], tmp_path: Path) -> None:
    expected = train(lambda model: model, tmp_path).state_dict()
    with dlkernels.override() as log:
        overridden = train(lambda model: model, tmp_path).state_dict()
    assert log.calls["linear"] > 0 and log.calls["cross_entropy"] == 2 and log.fallbacks == []
    converted = train(dlkernels.convert, tmp_path).state_dict()
    torch.testing.assert_close(overridden, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(converted, expected, rtol=1e-4, atol=1e-5)


# ---- ONNX ------------------------------------------------------------------------------------------------------------


class Attentions(torch.nn.Module):
    """Every way of calling attention: plain, causal, with each kind of mask, with shared heads."""

    def forward(self, query: Tensor, keys: Tensor, seen: Tensor) -> list[Tensor]:
        attention, shared = functional.scaled_dot_product_attention, keys[:, :2]
        return [
            attention(query, keys, keys),
            attention(query, keys, keys, is_causal=True, scale=0.2),
            attention(query, keys, keys, seen),
            attention(query, keys, keys, query[:, :, :, :6]),
            attention(query, shared, shared, enable_gqa=True),
        ]


class Recurrences(torch.nn.Module):
    """Layers, directions, biases or none, and the cell."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.LSTM(3, 4, 2, bidirectional=True)
        self.plain = nn.LSTM(3, 4, bias=False, batch_first=True)
        self.cell = nn.LSTMCell(3, 4)

    def forward(self, x: Tensor) -> Any:
        return self.deep(x), self.plain(x), self.cell(x[0])


class Losses(torch.nn.Module):
    """Both losses, with what ONNX can express."""

    def forward(self, x: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
        return [
            functional.cross_entropy(x, labels, torch.arange(1.0, 6.0), ignore_index=0),
            functional.cross_entropy(x.unsqueeze(-1), labels.unsqueeze(-1), reduction="none"),
            functional.linear_cross_entropy(x, weight, labels, reduction="sum"),
        ]


def normed_network() -> torch.nn.Module:
    model = torch.nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, (3, 2), (1, 2), (2, 1), groups=1), nn.BatchNorm2d(4), torch.nn.ReLU()),
        nn.Conv2d(4, 4, 4, padding="same", dilation=2, groups=2, bias=False),
        nn.BatchNorm2d(4, affine=False),
        torch.nn.Flatten(),
        nn.Linear(160, 3),
    )
    for norm in (model[0][1], model[2]):
        norm.running_mean.normal_()
    return model


SEEN = torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(0)) > 0.5
SEEN[0, 0, 1] = False  # a query that sees no key

EXPORTED: dict[str, tuple[Callable[[], torch.nn.Module], tuple[Tensor, ...]]] = {
    "network": (normed_network, (torch.randn(2, 3, 6, 9),)),
    "attention": (Attentions, (torch.randn(2, 4, 5, 8), torch.randn(2, 4, 6, 8), SEEN)),
    "multi-head attention": (lambda: nn.MultiheadAttention(8, 2), (torch.randn(5, 2, 8),) * 3),
    "recurrence": (Recurrences, (torch.randn(5, 2, 3),)),
    "losses": (Losses, (torch.randn(3, 5), torch.randn(4, 5), torch.tensor([1, 0, 3]))),
}


def exported_to_onnx(model: torch.nn.Module, arguments: tuple[Tensor, ...], **options: Any) -> Any:
    import_library("onnxscript")
    import dlkernels.onnx

    table = dlkernels.onnx.translation_table()
    return torch.onnx.export(model, arguments, dynamo=True, verbose=False, custom_translation_table=table, **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_computes_the_same(name: str) -> None:
    runtime = import_library("onnxruntime")
    torch.manual_seed(0)
    build, arguments = EXPORTED[name]
    model = build().eval()
    options = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if name == "network" else {}
    program = exported_to_onnx(model, arguments, **options)
    if name == "network":
        arguments = (torch.randn(5, 3, 6, 9),)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    inputs = {described.name: value.numpy() for described, value in zip(session.get_inputs(), arguments, strict=True)}
    actual = [torch.from_numpy(output) for output in session.run(None, inputs)]
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(*arguments))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("build", "shape", "message"),
    [
        (lambda: nn.BatchNorm1d(3, track_running_stats=False), (2, 3), "batch norm on the statistics of a batch"),
        (lambda: nn.LSTM(3, 4, proj_size=2), (5, 2, 3), "an LSTM with projections"),
    ],
)
def test_what_onnx_has_no_form_of_is_refused(
    build: Callable[[], torch.nn.Module], shape: tuple[int, ...], message: str
) -> None:
    import_library("onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError) as raised:
        exported_to_onnx(build().eval(), (torch.randn(shape),))
    error: BaseException | None = raised.value
    while not isinstance(error, NotImplementedError):
        assert error is not None
        error = error.__cause__
    assert message in str(error)


# ---- many processes --------------------------------------------------------------------------------------------------


def rank_network() -> torch.nn.Sequential:
    """The network of trainers, with statistics that do not depend on how a batch is cut."""
    model = image_network().double()
    model[1].eval()
    return model


def gradients_of(model: torch.nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    F.cross_entropy(model(images), labels).backward()
    return [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters() if p.grad is not None]


def run_rank(rank: int, store: str, images: Tensor, labels: Tensor) -> None:
    """One of two processes: its half of the batch through every wrapper, on a converted model."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    half = images[2 * rank : 2 * rank + 2], labels[2 * rank : 2 * rank + 2]
    expected = gradients_of(rank_network(), images, labels)
    mesh = init_device_mesh("cpu", (2,))

    def sharded(model: torch.nn.Sequential) -> torch.nn.Module:
        for layer in (model[0], model[4], model):
            fully_shard(layer, mesh=mesh)
        return model

    data_parallel = torch.nn.parallel.DistributedDataParallel
    wrapped = {
        "DDP of a converted model": data_parallel(dlkernels.convert(rank_network())),
        "converted inside DDP": dlkernels.convert(data_parallel(rank_network())),
        "FSDP2 of a converted model": sharded(dlkernels.convert(rank_network())),
    }
    for name, model in wrapped.items():
        assert [row.left for row in dlkernels.report(model)] == [None, None, None], name
        torch.testing.assert_close(gradients_of(model, *half), expected, msg=lambda text, name=name: f"{name}: {text}")
    too_late = dlkernels.convert(sharded(rank_network()))
    reasons = {row.name: row.left for row in dlkernels.report(too_late)}
    assert reasons == {"0": "sharded by FSDP2: convert before fully_shard", "1": None, "4": reasons["0"]}
    torch.testing.assert_close(gradients_of(too_late, *half), expected)
    with dlkernels.override() as log:
        torch.testing.assert_close(gradients_of(sharded(rank_network()), *half), expected)
    assert log.calls["conv2d"] == log.calls["linear"] == 1 and log.fallbacks == []
    torch.distributed.destroy_process_group()


def test_two_processes_get_the_gradients_of_one(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1])
    torch.multiprocessing.spawn(run_rank, (str(tmp_path / "store"), images, labels), nprocs=2)
