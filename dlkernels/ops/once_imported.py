"""Work that waits for a module to be imported: torch's compiler takes as long to import as all the rest of torch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Watch(MetaPathFinder):
    """Stands before the other finders until ``name`` is imported; then runs ``actions``, in their order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.actions: list[Callable[[], object]] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)  # so that the others are asked
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)  # for another attempt, should this one fail
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            del _WATCHES[self.name]
            for action in self.actions:
                action()

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


_WATCHES: dict[str, _Watch] = {}  # changed while modules are imported, under the lock of that


def once_imported(name: str, action: Callable[[], object]) -> None:
    """Runs ``action`` as soon as the module ``name`` is imported: at once where it is."""
    if name in sys.modules and name not in _WATCHES:
        action()
        return
    if name not in _WATCHES:
        _WATCHES[name] = _Watch(name)
        sys.meta_path.insert(0, _WATCHES[name])
    _WATCHES[name].actions.append(action)
