"""The names of the operations."""

from __future__ import annotations

from collections.abc import Iterable

OPERATIONS = ("conv2d", "batch_norm", "lstm", "linear", "cross_entropy", "linear_cross_entropy", "attention")


def chosen_operations(ops: Iterable[str] | None, skip: Iterable[str] = ()) -> tuple[str, ...]:
    """The operations that ``ops`` names, all by default, without those that ``skip`` names.

    Raises:
        ValueError: a name is none of :data:`OPERATIONS`, or one string was given in place of several.
    """
    for argument, names in (("ops", ops), ("skip", skip)):
        if isinstance(names, str):
            raise ValueError(f"{argument} must be a sequence of names, got the string {names!r}")
    wanted, unwanted = OPERATIONS if ops is None else tuple(ops), tuple(skip)
    for argument, names in (("ops", wanted), ("skip", unwanted)):
        for name in names:
            if name not in OPERATIONS:
                raise ValueError(f"{argument} names {name!r}, expected some of {', '.join(OPERATIONS)}")
    return tuple(name for name in wanted if name not in unwanted)
