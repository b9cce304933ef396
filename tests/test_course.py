"""What the course's figures ask for and no network's own tests check, a test for each."""

from __future__ import annotations

import ast
import math
import re
from itertools import product
from pathlib import Path

import pytest
import torch

from dlkernels import data, functional
from dlkernels.train.cross_validation import cross_validate, estimator_score


def test_nearest_neighbours_with_a_cross_validated_k_recognise_digits() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    split = data.load_digits(0)
    train, test = (split.train_images, split.train_labels), (split.test_images, split.test_labels)
    scores = {k: estimator_score(neighbors.KNeighborsClassifier(k)) for k in (1, 3, 5, 10, 50)}
    validated = {k: cross_validate(score, *train).mean for k, score in scores.items()}
    chosen = max(validated, key=lambda k: validated[k])
    assert validated[50] < validated[chosen] - 0.02  # k matters
    assert scores[chosen](train, test) >= 0.97


def test_the_output_of_a_convolution_has_the_size_of_the_rule() -> None:
    checked = 0
    for size, kernel, padding, dilation, stride in product((5, 8, 11), (1, 2, 3, 5), (0, 1, 3), (1, 2, 3), (1, 2, 3)):
        expected = math.floor((size + 2 * padding - dilation * (kernel - 1) - 1) / stride) + 1
        if expected >= 1:
            x, weight = torch.zeros(1, 1, size, size + 1), torch.zeros(1, 1, kernel, kernel)
            output = functional.conv2d(x, weight, None, stride, padding, dilation)
            wider = math.floor((size + 1 + 2 * padding - dilation * (kernel - 1) - 1) / stride) + 1
            assert output.shape == (1, 1, expected, wider), (size, kernel, padding, dilation, stride)
            checked += 1
    assert checked > 200


def test_every_part_of_the_course_names_tests_that_there_are() -> None:
    folder = Path(__file__).parent
    _, *parts = (folder.parent / "docs" / "course.md").read_text(encoding="utf-8").split("\n## ")
    assert {n for part in parts for n in re.findall(r"#lecture_(\d+)", part)} == {f"{n:02}" for n in range(2, 14)}
    for part in parts:
        named = re.findall(r"^- `(test_\w+\.py)(?:::(test_\w+))?`$", part, re.MULTILINE)
        assert named, part
        for file, test in named:
            body = ast.parse((folder / file).read_text(encoding="utf-8")).body
            assert test in ("", *(node.name for node in body if isinstance(node, ast.FunctionDef))), f"{file}::{test}"
