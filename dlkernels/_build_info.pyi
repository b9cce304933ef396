from typing import Any

BUILD_INFO: dict[str, Any]
"""Written by the build: dlkernels, torch, cxx11_abi, python, compiler, instruction_sets, cuda, cuda_reason."""
