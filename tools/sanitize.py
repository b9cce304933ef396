"""Fuzzes and tests the kernels built with AddressSanitizer and UndefinedBehaviorSanitizer.

    make sanitize                                       ten minutes of fuzzing, then the operations' tests
    make sanitize SANITIZE_ARGS="--seconds 60 --no-tests"

The sanitized package and a copy of the tests lie in build/sanitize, so that the ordinary build stays as it is. What a
sanitizer finds ends the process that it is found in, with a report that names the line.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = runpy.run_path(str(ROOT / "dlkernels" / "operations.py"))["OPERATIONS"]  # the package need not be built
SANITIZED = ROOT / "build" / "sanitize"
# What an AVX2 processor runs; the last has the lines of AVX-512, its pairs of bfloat16 and the tiles of AMX.
INSTRUCTION_SETS = ("avx2", "amx_emulated")
TESTS = [*(f"tests/test_{name}.py" for name in OPERATIONS), "tests/test_accuracy.py", "tests/test_layouts.py"]
TESTS += ["tests/test_bad_input.py", "tests/reports"]


def build() -> None:
    """Puts the sanitized package into build/sanitize, beside the tests and their configuration."""
    switches = {"DLKERNELS_SANITIZE": "1", "DLKERNELS_EMULATE": "1", "DLKERNELS_ISAS": ",".join(INSTRUCTION_SETS)}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", "build/sanitize-base"]
    command += ["--build-lib", str(SANITIZED)]
    subprocess.run(command, cwd=ROOT, env=os.environ | switches, check=True)
    shutil.rmtree(SANITIZED / "tests", ignore_errors=True)
    shutil.copytree(ROOT / "tests", SANITIZED / "tests")
    shutil.copy2(ROOT / "pyproject.toml", SANITIZED)


def environment() -> dict[str, str]:
    """AddressSanitizer has to be loaded first, and C++'s library with it: it looks for the function that throws when it
    is loaded. What Python and torch keep until the end are no leaks of ours."""
    asked = (["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6"))
    found = (subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for command in asked)
    return os.environ | {
        "LD_PRELOAD": ":".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(SANITIZED),
    }


def main() -> None:
    """Builds, fuzzes, tests; exits with 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="time to fuzz for")
    parser.add_argument("--no-tests", action="store_true", help="fuzz alone")
    parser.add_argument("--pytest", default="", help="further options of pytest, such as '-k conv2d'")
    options = parser.parse_args()
    build()
    commands = [[sys.executable, "-m", "tests.fuzz", "--seconds", str(options.seconds)]]
    if not options.no_tests:
        marks = ["-m", "not slow", "-n", "2", "-q", *options.pytest.split()]
        commands.append([sys.executable, "-m", "pytest", *marks, *TESTS])
    failed = [command for command in commands if subprocess.run(command, cwd=SANITIZED, env=environment()).returncode]
    for command in failed:
        print("failed:", " ".join(command))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
