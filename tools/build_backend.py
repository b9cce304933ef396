"""The build backend: setuptools', preceded by one step that finds the torch of the environment being installed into.

The extension is only good for the torch that it was compiled against. `torch` in build-system.requires would fetch the
newest torch into pip's isolated environment and compile against that one. So torch is looked up where it will be used:
pip runs an isolated build with the interpreter of the target environment, hiding that environment's packages, and here
they are brought back, behind the isolated ones. When there is no torch, the build stops before it compiles and says
what to do.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

try:
    from setuptools import build_meta
    from setuptools.version import __version__ as setuptools_version
except ImportError:
    setuptools_version = "0"
if int(setuptools_version.split(".")[0]) < 77:  # only without build isolation, which leaves the environment as it is
    sys.exit("dlkernels: building without isolation needs: pip install 'setuptools>=77' wheel cmake ninja")

Config = dict[str, Any] | None

ROOT = Path(__file__).resolve().parent.parent


def target_site_folders() -> list[str]:
    """Folders that hold the packages of the environment being installed into, most particular first."""
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    # Tools other than pip build in a virtual environment of their own; the user's is then the activated one.
    activated = os.environ.get("VIRTUAL_ENV")
    if activated and "PIP_BUILD_TRACKER" not in os.environ:
        there = {"base": activated, "platbase": activated}
        folders += [sysconfig.get_path("platlib", vars=there), sysconfig.get_path("purelib", vars=there)]
    return [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]


def supported_torch() -> str:
    """The torch requirement of pyproject.toml, such as `torch>=2.11,<2.16`."""
    found = re.search(r'"(torch>=[\d.]+,<[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None, "pyproject.toml names no range of torch versions"
    return found.group(1)


def find_torch() -> None:
    """Makes the target environment's torch importable, or exits with what to do about it."""
    if importlib.util.find_spec("torch") is None:
        for folder in target_site_folders():
            site.addsitedir(folder)
    importlib.invalidate_caches()
    requirement = supported_torch()
    if importlib.util.find_spec("torch") is None:
        by_pip = "PIP_BUILD_TRACKER" in os.environ
        install_first = f"Either install torch there first:  {sys.executable} -m pip install '{requirement}'"
        use_pip = "Either install with pip, in an environment that has torch:  pip install ."
        sys.exit(
            f"dlkernels: no torch in {sys.prefix} (Python {sys.version_info[0]}.{sys.version_info[1]}), "
            "and the extension is compiled against the torch that will run it.\n"
            f"  {install_first if by_pip else use_pip}\n"
            "  or build with the packages that Python already sees:  pip install --no-build-isolation ."
        )
    version = importlib.metadata.version("torch")
    lowest, above = (tuple(map(int, bound.split("."))) for bound in re.findall(r"\d[\d.]*", requirement))
    release = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if not lowest <= release < above:
        sys.exit(f"dlkernels: torch {version} is installed in {sys.prefix}; expected {requirement}")


def get_requires_for_build_wheel(config_settings: Config = None) -> list[str]:
    find_torch()
    return build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings: Config = None) -> list[str]:
    find_torch()
    return build_meta.get_requires_for_build_editable(config_settings)


def build_wheel(wheel_directory: str, config_settings: Config = None, metadata_directory: str | None = None) -> str:
    find_torch()
    # setuptools packs whatever lies in its staging folder, modules deleted since the last build too.
    for staged in (ROOT / "build").glob("lib*"):
        shutil.rmtree(staged)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Config = None, metadata_directory: str | None = None) -> str:
    find_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
build_sdist = build_meta.build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
