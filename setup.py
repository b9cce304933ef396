"""pip's door to CMake, and nothing else: finds torch and Python's headers, runs CMake, puts `_C` where it belongs."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Options of CMakeLists.txt that are switched on by "1" in the environment.
SWITCHES = ("DLKERNELS_WERROR", "DLKERNELS_EMULATE", "DLKERNELS_CUDA", "DLKERNELS_SIMT", "DLKERNELS_SANITIZE")


def number_of_jobs() -> int:
    """Compilers to run at once: MAX_JOBS, else what cores and memory allow (a file that includes torch needs 2 GB)."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available_gb = int(meminfo["MemAvailable"].split()[0]) / 2**20
    except (OSError, KeyError, ValueError):
        return cores
    return max(1, min(cores, int(0.8 * available_gb / 2)))


def find_tool(name: str) -> str:
    """Path of cmake or ninja: the one installed as a Python package, else the one on PATH."""
    try:
        package = importlib.import_module(name)
        folder = package.CMAKE_BIN_DIR if name == "cmake" else package.BIN_DIR
        found = shutil.which(name, path=folder) or shutil.which(name)
    except ImportError:
        found = shutil.which(name)
    if found is None:
        sys.exit(f"dlkernels: {name} was not found; run: {sys.executable} -m pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Builds `_C` with CMake in a folder that persists, so that the next build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        import torch

        # One folder for each Python and torch, because objects of one are useless to another.
        name = f"{sysconfig.get_config_var('SOABI')}-torch{torch.__version__}"
        build_folder = ROOT / "build" / (f"{name}-sanitize" if os.environ.get("DLKERNELS_SANITIZE") == "1" else name)
        self.run_cmake(build_folder)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build_folder / target.name, target)
        facts = {
            "dlkernels": self.distribution.get_version(),
            "torch": torch.__version__,
            "cxx11_abi": torch.compiled_with_cxx11_abi(),
            "python": platform.python_version(),
            **json.loads((build_folder / "build_facts.json").read_text()),
        }
        self.write_build_info(target.parent / "_build_info.py", facts)
        kernels = f"CPU kernels ({', '.join(facts['instruction_sets'])})"
        print(f"dlkernels {facts['dlkernels']}: {kernels} for torch {facts['torch']}; {facts['cuda_reason']}")

    def run_cmake(self, build_folder: Path) -> None:
        """Configures and builds, telling CMake what only Python knows."""
        import torch
        from torch.utils import cpp_extension

        library_paths = cpp_extension.library_paths()
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            **{name: os.environ.get(name, "0") for name in SWITCHES},
            "DLKERNELS_ISAS": os.environ.get("DLKERNELS_ISAS", "").replace(",", ";"),
            "DLKERNELS_PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
            "DLKERNELS_TORCH_INCLUDE_DIRS": ";".join(cpp_extension.include_paths()),
            "DLKERNELS_TORCH_LIBRARY_DIRS": ";".join(library_paths),
            "DLKERNELS_TORCH_CXX11_ABI": str(int(torch.compiled_with_cxx11_abi())),
            "DLKERNELS_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            # Beside torch once installed; a checkout or another site-packages folder needs the full path.
            "DLKERNELS_RPATH": ":".join(["$ORIGIN/../torch/lib", *library_paths]),
        }
        cmake = find_tool("cmake")
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        self.run_tool([cmake, "-S", str(ROOT), "-B", str(build_folder), "-G", "Ninja", *definitions])
        self.run_tool([cmake, "--build", str(build_folder), "--target", "_C", "--parallel", str(number_of_jobs())])

    def run_tool(self, command: list[str]) -> None:
        print("dlkernels:", " ".join(command), flush=True)
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"dlkernels: the build stopped (exit status {error.returncode}); the messages above say where")

    def write_build_info(self, path: Path, facts: dict[str, object]) -> None:
        entries = "".join(f"    {name!r}: {value!r},\n" for name, value in facts.items())
        comment = "# Written by the build; compared with the running torch at import."
        path.write_text(f"{comment}\nBUILD_INFO = {{\n{entries}}}\n")

    def copy_extensions_to_source(self) -> None:
        """For `--inplace` and editable installs: the build facts go where the extension goes."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))
            shutil.copyfile(built.parent / "_build_info.py", ROOT / "dlkernels" / "_build_info.py")


setup(ext_modules=[Extension("dlkernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
