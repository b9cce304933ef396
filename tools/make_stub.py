"""Writes dlkernels/_C.pyi, the types of the extension, from the extension that is built in place (`make stub`)."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = '"""The compiled extension: one function an operation. Written by `make stub`."""\n\n'
# What pybind11 accepts, in the words that a caller thinks in.
TIDIER = [
    (r"typing\.SupportsInt \| typing\.SupportsIndex", "int"),
    (r"typing\.SupportsFloat \| typing\.SupportsIndex", "float"),
    (r"^from __future__ import annotations\n", ""),
    (r"^__all__.*\n", ""),
    (r":\n    \.\.\.$", ": ..."),
]


def stub_text() -> str:
    """The stub that pybind11-stubgen makes of the extension, tidied."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pybind11_stubgen", "dlkernels._C", "-o", folder], cwd=ROOT, check=True)
        text = (Path(folder) / "dlkernels" / "_C.pyi").read_text()
    for pattern, replacement in TIDIER:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    used = [name for name in ("collections.abc", "torch", "typing") if re.search(rf"(?<!import ){name}\.", text)]
    body = re.sub(r"^import .*\n", "", text, flags=re.MULTILINE)
    return HEADER + "".join(f"import {name}\n" for name in used) + body


if __name__ == "__main__":
    stub = ROOT / "dlkernels" / "_C.pyi"
    stub.write_text(stub_text())
    subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet", "--select", "I", "--fix", stub], check=True)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", stub], check=True)
