"""What holds for every network: found by name, its weights checked before they are loaded."""

from __future__ import annotations

import pytest
import torch

from dlkernels import models


def test_every_network_is_found_by_its_name() -> None:
    names = models.list_models()
    assert names == sorted(names)
    assert all(callable(models.get_model_builder(name)) for name in names)


def test_an_unknown_network_is_an_error_that_names_the_closest() -> None:
    with pytest.raises(ValueError, match=r"no network named 'lenett'; did you mean lenet"):
        models.get_model("lenett")
    with pytest.raises(ValueError, match=r"family must be one of .*lenet.*, got 'nonet'"):
        models.list_models("nonet")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="a network named 'lenet' is registered already"):
        models.registry.register(models.LeNet)


def test_weights_that_do_not_fit_are_named_and_change_nothing() -> None:
    model = models.LeNet(8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: torch.full_like(tensor, 7) for name, tensor in before.items()}
    first, *_, last = weights
    wrong_shape = {**weights, last: torch.zeros(3)}
    with pytest.raises(ValueError, match=rf"'{last}' has shape \[3\], LeNet needs \[10\]"):
        models.load_weights(model, wrong_shape)
    with pytest.raises(ValueError, match=f"the weights have no '{first}'"):
        models.load_weights(model, {name: tensor for name, tensor in weights.items() if name != first})
    with pytest.raises(ValueError, match="the weights have 'extra', which LeNet has not"):
        models.load_weights(model, {**weights, "extra": torch.zeros(1)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    models.load_weights(model, weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
