"""What is public has an example in its docstring, which gives what it says; so do those of the documentation."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dlkernels
from dlkernels import functional, models, nn
from dlkernels.models import decoding

PAGES = [path for path in Path(__file__).parents[1].glob("docs/**/*.md") if ">>>" in path.read_text(encoding="utf-8")]

PUBLIC: list[Callable[..., Any]] = [
    *(getattr(functional, name) for name in functional.__all__),
    *(getattr(nn, name) for name in nn.__all__),
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
    assert_true(tests)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of_pages_give_what_they_say(page: Path) -> None:
    blocks = re.findall(r"```pycon\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks, "examples must stand in blocks of pycon"
    names = {"dlkernels": dlkernels, "torch": torch}
    assert_true([doctest.DocTestParser().get_doctest(block, names, page.name, str(page), 0) for block in blocks])


def assert_true(tests: list[doctest.DocTest]) -> None:
    said: list[str] = []
    for test in tests:
        doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("name", ["nn", "ssl", "visualize"])
def test_the_page_of_a_package_lists_all_that_is_public(name: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "api" / f"{name}.md").read_text(encoding="utf-8")
    listed = {member for members in re.findall(r"members: \[(.*?)\]", page, re.DOTALL) for member in members.split()}
    assert {member.rstrip(",") for member in listed} == set(importlib.import_module(f"dlkernels.{name}").__all__)
