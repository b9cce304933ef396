"""What is public has an example in its docstring, which gives what it says."""

from __future__ import annotations

import doctest
import sys
from collections.abc import Callable
from typing import Any

import pytest

import dlkernels
from dlkernels import functional, models
from dlkernels.models import decoding

PUBLIC: list[Callable[..., Any]] = [
    *(getattr(functional, name) for name in functional.__all__),
    dlkernels.convert,
    dlkernels.fuse,
    dlkernels.override,
    dlkernels.report,
    dlkernels.revert,
    models.get_model,
    models.get_model_builder,
    models.list_models,
    models.load_weights,
    decoding.beam_search,
    decoding.greedy,
    decoding.sample,
]


@pytest.mark.parametrize("symbol", PUBLIC, ids=lambda symbol: symbol.__name__)
def test_examples_give_what_they_say(symbol: Callable[..., Any]) -> None:
    names = vars(sys.modules[symbol.__module__])
    tests = doctest.DocTestFinder(recurse=False).find(symbol, symbol.__name__, globs=dict(names))
    assert [test for test in tests if test.examples], "no example"
    said: list[str] = []
    for test in tests:
        doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)
