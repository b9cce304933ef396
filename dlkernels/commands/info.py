"""``dlkernels info``: what is installed, and whether it works."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .. import info
from . import Failure


def info_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell versions, instruction sets and build facts, and test every operation."""
    facts = info.report()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        print_facts(facts)
    failed = [check["name"] for check in facts["self_test"] if not check["passed"]]
    if failed:
        raise Failure(f"the self-test failed: {', '.join(failed)}")


def print_facts(facts: dict[str, Any]) -> None:
    """The report in lines, for a person."""
    for name in ("dlkernels", "torch", "python", "system"):
        print(f"{name:<16}{facts[name]}")
    print(f"{'processor':<16}{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads in use")
    print(f"{'instructions':<16}{facts['isa']} (available: {', '.join(facts['available_isas'])})")
    print(f"{'DLKERNELS_ISA':<16}{facts['DLKERNELS_ISA'] or 'not set'}")
    for name, value in facts["build"].items():
        print(f"{'build':<16}{name}: {', '.join(value) if isinstance(value, list) else value}")
    for check in facts["self_test"]:
        outcome = "ok" if check["passed"] else "FAILED"
        error = (
            check["message"] if check["error"] is None else f"error {check['error']:.1e}, bound {check['bound']:.0e}"
        )
        print(f"{'self-test':<16}{check['name']}: {outcome}, {error}, {1e3 * check['seconds']:.0f} ms")
