"""Search of settings at random (Bergstra & Bengio 2012) or on a grid, through optuna; resumes where it was cut short.

A study in an SQLite file keeps every trial that has ended. The settings of a trial follow from the study's name, the
seed and how many trials have ended before it, so a search that was interrupted ends as it would have without.
"""

from __future__ import annotations

import errno
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import FloatDistribution

Parameters = dict[str, float]
Score = Callable[[Parameters], float]


@dataclass(frozen=True)
class Trial:
    """One choice of settings, and how well it did; the larger, the better."""

    parameters: Parameters
    score: float


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the largest score, the first of them."""
    return max(trials, key=lambda trial: trial.score)


def random_search(
    score: Score,
    space: Mapping[str, tuple[float, float]],
    trials: int,
    *,
    seed: int = 0,
    storage: Path | None = None,
    name: str = "random",
    identity: str = "",
) -> list[Trial]:
    """Scores settings whose logarithms are drawn uniformly.

    Args:
        score: of settings; the larger, the better. What is not a number counts as minus infinity.
        space: least and greatest value of each setting, positive.
        trials: how many in all, those of earlier runs counted.
        seed: decides the settings.
        storage: the SQLite file that keeps the trials, made where there is none; they are forgotten if not given.
        name: of the study in it; another name draws other settings.
        identity: of what the score is measured on, for instance a checksum of the data.

    Raises:
        OSError: the file is no database, or cannot be read or written; the error names it.
        ValueError: a range is not positive or upside down, ``trials`` is not positive, or the file has a study of this
            name with another space, seed or identity.
    """
    from optuna.distributions import FloatDistribution

    for setting, (low, high) in space.items():
        if not 0 < low <= high < math.inf:
            raise ValueError(f"space must have 0 < least <= greatest, got {setting}: {(low, high)}")
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    ranges = {setting: FloatDistribution(low, high, log=True) for setting, (low, high) in space.items()}
    searched = {setting: list(limits) for setting, limits in space.items()}
    facts = {"identity": identity, "space": searched, "seed": seed}
    return _run(score, lambda number: ranges, trials, seed, storage, name, facts)


def grid_search(
    score: Score,
    grid: Mapping[str, Sequence[float]],
    *,
    storage: Path | None = None,
    name: str = "grid",
    identity: str = "",
) -> list[Trial]:
    """Scores every combination of values, in the order of ``itertools.product``; arguments as :func:`random_search`.

    Args:
        grid: the values of each setting.

    Raises:
        ValueError: a setting has no values, or the file has a study of this name with another grid or identity.
    """
    from optuna.distributions import FloatDistribution

    if not grid or not all(grid.values()):
        raise ValueError(f"grid must have values for each setting, got {dict(grid)}")
    points = list(product(*grid.values()))

    def point(number: int) -> dict[str, FloatDistribution]:
        return {setting: FloatDistribution(value, value) for setting, value in zip(grid, points[number], strict=True)}

    facts = {"identity": identity, "grid": {setting: list(values) for setting, values in grid.items()}}
    return _run(score, point, len(points), 0, storage, name, facts)


def _run(
    score: Score,
    ranges: Callable[[int], dict[str, FloatDistribution]],
    count: int,
    seed: int,
    storage: Path | None,
    name: str,
    facts: dict[str, Any],
) -> list[Trial]:
    """Takes the trials that are left of ``count``; ``ranges`` are those of the trial with a number from 0."""
    import optuna
    from optuna.trial import TrialState

    with _quiet(), _database(storage) as database:
        study = optuna.create_study(storage=database, study_name=name, direction="maximize", load_if_exists=True)
        known = study.user_attrs.get("facts", facts)
        for key in known | facts:
            if known.get(key) != facts.get(key):
                other = f"{known.get(key)}, asked for {facts.get(key)}"
                raise ValueError(f"{storage} has a study {name!r} with another {key}: {other}")
        study.set_user_attr("facts", facts)

        def ended() -> list[Trial]:
            complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            return [Trial(trial.params, trial.values[0]) for trial in complete]

        while (number := len(ended())) < count:
            study.sampler = optuna.samplers.RandomSampler(zlib.crc32(f"{name} {seed} {number}".encode()))
            trial = study.ask(dict(ranges(number)))
            try:
                value = score(trial.params)
            except BaseException:
                study.tell(trial, state=TrialState.FAIL)
                raise
            study.tell(trial, -math.inf if math.isnan(value) else value)
        return ended()[:count]


@contextmanager
def _database(storage: Path | None) -> Iterator[Any]:
    """optuna's storage in an SQLite file, closed at the end; None keeps it in memory.

    Raises:
        OSError: the file is no database or cannot be read or written; the error names it.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    if storage is None:
        yield None
        return
    storage.parent.mkdir(parents=True, exist_ok=True)
    try:
        database = optuna.storages.RDBStorage(f"sqlite:///{storage}")
        try:
            yield database
        finally:
            database.remove_session()
            database.engine.dispose()
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
        raise OSError(errno.EIO, str(getattr(cause, "orig", None) or error), str(storage)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without optuna's lines about each study."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
