"""Searches: log-uniform and whole grids, and the same whether or not they were interrupted."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from dlkernels.train import search
from dlkernels.train.search import Parameters, Trial

optuna = pytest.importorskip("optuna")

SPACE = {"learning_rate": (1e-4, 1.0), "weight_decay": (1e-6, 1e-2)}


def distance(parameters: Parameters) -> float:
    """Largest, zero, at 1e-2 and 1e-4."""
    return -abs(math.log10(parameters["learning_rate"]) + 2) - abs(math.log10(parameters["weight_decay"]) + 4)


class Interrupted(Exception):
    """As when a machine goes down."""


def interrupted_at(call: int) -> Callable[[Parameters], float]:
    calls = 0

    def score(parameters: Parameters) -> float:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Interrupted
        return distance(parameters)

    return score


def test_random_settings_are_log_uniform_and_independent() -> None:
    trials = search.random_search(distance, SPACE, 300)
    shares = []
    for name, (low, high) in SPACE.items():
        values = [math.log(trial.parameters[name] / low) / math.log(high / low) for trial in trials]
        assert min(values) >= 0 and max(values) <= 1
        for quarter in range(4):
            count = sum(quarter <= 4 * value < quarter + 1 for value in values)
            assert count == pytest.approx(75, abs=25)
        shares.append(values)
    products = [(a - 0.5) * (b - 0.5) for a, b in zip(*shares, strict=True)]
    assert abs(sum(products) / len(products)) < 0.015  # of 1/12 if they were the same
    assert [trial.score for trial in trials] == [distance(trial.parameters) for trial in trials]
    assert search.best(trials).score == max(trial.score for trial in trials) > -1


def test_settings_follow_from_seed_and_name() -> None:
    first, again = (search.random_search(distance, SPACE, 5) for _ in range(2))
    assert first == again
    others = [search.random_search(distance, SPACE, 5, seed=1), search.random_search(distance, SPACE, 5, name="other")]
    for other in others:
        assert not {trial.score for trial in other} & {trial.score for trial in first}


@pytest.mark.parametrize("kind", ["random", "grid"])
def test_a_search_that_was_interrupted_ends_as_without(kind: str, tmp_path: Path) -> None:
    def run(score: Callable[[Parameters], float], storage: Path | None) -> list[Trial]:
        if kind == "random":
            return search.random_search(score, SPACE, 6, storage=storage)
        grid = {"learning_rate": [1e-3, 1e-2, 1e-1], "weight_decay": [1e-5, 1e-4]}
        return search.grid_search(score, grid, storage=storage)

    storage = tmp_path / "new" / "studies.sqlite"
    whole = run(distance, None)
    for call in (3, 2):
        with pytest.raises(Interrupted):
            run(interrupted_at(call), storage)
    optuna.load_study(study_name=kind, storage=f"sqlite:///{storage}").ask()  # a process that was killed in a trial
    # Two and one trials have ended; three are left.
    with pytest.raises(Interrupted):
        run(interrupted_at(4), storage.parent / "other.sqlite")
    assert run(interrupted_at(4), storage) == whole
    assert run(interrupted_at(1), storage) == whole  # nothing is left to do
    assert run(distance, storage.parent / "other.sqlite") == whole


def test_more_trials_go_on_from_fewer(tmp_path: Path) -> None:
    storage = tmp_path / "studies.sqlite"
    few = search.random_search(distance, SPACE, 2, storage=storage)
    more = search.random_search(interrupted_at(4), SPACE, 5, storage=storage)
    assert more[:2] == few
    assert more == search.random_search(distance, SPACE, 5)
    assert search.random_search(distance, SPACE, 2, storage=storage) == few


def test_a_grid_is_every_combination_in_order() -> None:
    trials = search.grid_search(lambda parameters: parameters["a"] * parameters["b"], {"a": [1, 2], "b": [3, 5, 7]})
    found = [(trial.parameters["a"], trial.parameters["b"], trial.score) for trial in trials]
    assert found == [(1, 3, 3), (1, 5, 5), (1, 7, 7), (2, 3, 6), (2, 5, 10), (2, 7, 14)]
    assert search.best(trials).parameters == {"a": 2, "b": 7}


def test_what_is_not_a_number_counts_least(tmp_path: Path) -> None:
    scores = iter([math.nan, 0.5, -math.inf])
    trials = search.random_search(lambda _: next(scores), SPACE, 3, storage=tmp_path / "studies.sqlite")
    assert [trial.score for trial in trials] == [-math.inf, 0.5, -math.inf]
    assert search.best(trials).score == 0.5


def test_the_file_is_a_study_of_optunas(tmp_path: Path) -> None:
    storage = tmp_path / "studies.sqlite"
    trials = search.random_search(distance, SPACE, 3, storage=storage, name="rates")
    study = optuna.load_study(study_name="rates", storage=f"sqlite:///{storage}")
    assert study.best_value == search.best(trials).score
    assert study.best_params == search.best(trials).parameters


def test_optunas_own_messages_are_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    search.random_search(distance, SPACE, 1, storage=tmp_path / "studies.sqlite")
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    assert capfd.readouterr() == ("", "")


def test_a_study_of_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    storage = tmp_path / "studies.sqlite"
    search.random_search(distance, SPACE, 1, storage=storage, identity="these data")
    for space, arguments, key in (
        ({**SPACE, "weight_decay": (1e-6, 1e-3)}, {"identity": "these data"}, "space"),
        (SPACE, {"identity": "other data"}, "identity"),
        (SPACE, {"identity": "these data", "seed": 1}, "seed"),
    ):
        with pytest.raises(ValueError, match=f"has a study 'random' with another {key}: "):
            search.random_search(distance, space, 1, storage=storage, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has a study 'random' with another space: "):
        search.grid_search(distance, {"learning_rate": [1.0]}, storage=storage, name="random", identity="these data")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: search.random_search(distance, {"a": (0.0, 1.0)}, 1), r"0 < least <= greatest, got a: \(0.0, 1.0\)"),
        (lambda: search.random_search(distance, {"a": (2.0, 1.0)}, 1), r"0 < least <= greatest, got a: \(2.0, 1.0\)"),
        (lambda: search.random_search(distance, SPACE, 0), "trials must be at least 1, got 0"),
        (lambda: search.grid_search(distance, {}), "grid must have values for each setting, got {}"),
        (lambda: search.grid_search(distance, {"a": []}), r"grid must have values for each setting, got {'a': \[\]}"),
    ],
)
def test_bad_input_is_an_error_that_says_what_was_expected(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
