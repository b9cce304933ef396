"""Tools that look classes up: those that ask isinstance work on converted models; of the others the report warns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import fusion, parametrizations, prune

import dlkernels
from dlkernels import nn

WARNING = "code that compares classes exactly"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def network() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(32, 4)
    ).eval()


IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def quantised(model: torch.nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if "quantized" in type(m).__module__]


def test_dynamic_quantisation_has_the_model_before_convert_or_after_revert() -> None:
    quantize = torch.ao.quantization.quantize_dynamic
    first = quantize(network(), {torch.nn.Linear})
    assert quantised(dlkernels.convert(first)) == ["Linear", "LinearPackedParams"]
    assert [row.left for row in dlkernels.report(first)][:3] == [None, None, "quantized"]
    first(IMAGES)

    too_late = quantize(dlkernels.convert(network()), {torch.nn.Linear})
    assert quantised(too_late) == []
    assert WARNING in str(dlkernels.report(too_late))
    assert quantised(quantize(dlkernels.revert(too_late), {torch.nn.Linear})) == ["Linear", "LinearPackedParams"]


def test_the_report_warns_only_where_something_is_here() -> None:
    model = network()
    assert WARNING not in str(dlkernels.report(model))
    assert WARNING in str(dlkernels.report(dlkernels.convert(model)))
    assert WARNING not in str(dlkernels.report(dlkernels.revert(model)))


def test_convert_says_so() -> None:
    assert "quantize_dynamic" in str(dlkernels.convert.__doc__)


def test_fusing_modules_by_class_is_refused_aloud() -> None:
    with pytest.raises(AssertionError, match="did not find fuser method"):
        torch.ao.quantization.fuse_modules(dlkernels.convert(network()), ["0", "1"])


def pruned(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            prune.l1_unstructured(module, "weight", amount=0.5)


def weight_normed(model: Any) -> None:
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[3])


def folded(model: Any) -> None:
    model[0], model[1] = fusion.fuse_conv_bn_eval(model[0], model[1]), torch.nn.Identity()


def synchronised(model: Any) -> None:
    model[1] = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model[1])
    assert type(model[1]) is torch.nn.SyncBatchNorm


class LowRank(torch.nn.Module):
    """An adapter around a linear layer, as LoRA's."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted(model: Any) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.set_submodule(name, LowRank(module))


@pytest.mark.parametrize("tool", [pruned, weight_normed, folded, synchronised, adapted])
def test_tools_that_ask_isinstance_work_on_converted_models(tool: Any) -> None:
    torch.manual_seed(0)
    plain = network()
    converted = dlkernels.convert(copy.deepcopy(plain))
    for model in (plain, converted):
        torch.manual_seed(1)
        tool(model)
        model.eval()
    torch.testing.assert_close(converted(IMAGES), plain(IMAGES))
    assert len(list(converted.parameters())) == len(list(plain.parameters()))


def test_wrap_policies_find_converted_layers() -> None:
    wrap = pytest.importorskip("torch.distributed.fsdp.wrap")
    model = dlkernels.convert(network())
    policy = wrap.ModuleWrapPolicy({torch.nn.Linear, torch.nn.Conv2d})
    found = policy._run_policy(model, set(), {})
    assert [type(module) for module in found] == [nn.Conv2d, nn.Linear]
