"""Building, installing, importing: which torch a build finds, what a wrong environment is told, what objects hold."""

import ast
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / f"{sysconfig.get_config_var('SOABI')}-torch{torch.__version__}"
WIDE_ISAS = ["avx2", "avx512", "avx512_bf16", "amx"]


def run(command, **environment):
    """Runs a command with a clean set of the variables that steer Python and pip; returns the finished process."""
    steering = ("PYTHONPATH", "VIRTUAL_ENV", "PIP_BUILD_TRACKER")
    kept = {name: value for name, value in os.environ.items() if name not in steering}
    command = [str(word) for word in command]
    return subprocess.run(command, env={**kept, **environment}, cwd="/", capture_output=True, text=True, check=False)


# ---- The build backend finds the torch of the target environment -----------------------------------------------------


@pytest.fixture
def environments(tmp_path):
    """Returns make(name): an empty virtual environment, as the pair (python, site-packages)."""

    def make(name):
        folder = tmp_path / name
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        (site_packages,) = folder.glob("lib/python*/site-packages")
        return folder / "bin" / "python", site_packages

    return make


@pytest.fixture
def overlay(tmp_path):
    """What pip gives an isolated build: setuptools, and a sitecustomize that hides the environment's own packages."""
    folder = tmp_path / "overlay"
    folder.mkdir()
    packages = Path(setuptools.__file__).parent.parent
    for name in ("setuptools", "_distutils_hack", f"setuptools-{setuptools.__version__}.dist-info"):
        (folder / name).symlink_to(packages / name)
    (folder / "sitecustomize.py").write_text(
        "import sys, sysconfig\n"
        "hidden = {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}\n"
        "sys.path[:] = [folder for folder in sys.path if folder not in hidden]\n"
    )
    return folder


def install_fake_torch(site_packages, version):
    (site_packages / "torch").mkdir()
    (site_packages / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    metadata = site_packages / f"torch-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")


def run_backend(python, overlay, **environment):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import build_backend; build_backend.find_torch()"
    return run([python, "-c", code + "; import torch; print(torch.__file__)"], PYTHONPATH=str(overlay), **environment)


def test_isolated_build_finds_the_torch_that_isolation_hides(environments, overlay):
    python, site_packages = environments("target")
    install_fake_torch(site_packages, "2.13.0+cpu")
    finished = run_backend(python, overlay, PIP_BUILD_TRACKER="/tmp")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == str(site_packages / "torch" / "__init__.py")


def test_a_tool_with_a_build_environment_of_its_own_gets_the_activated_torch(environments, overlay):
    python, _ = environments("build")
    _, site_packages = environments("activated")
    install_fake_torch(site_packages, "2.12.1")
    finished = run_backend(python, overlay, VIRTUAL_ENV=str(site_packages.parents[2]))
    assert finished.stdout.strip() == str(site_packages / "torch" / "__init__.py"), finished.stderr


def test_pip_ignores_an_activated_environment_that_it_does_not_install_into(environments, overlay):
    python, _ = environments("target")
    _, site_packages = environments("activated")
    install_fake_torch(site_packages, "2.13.0")
    finished = run_backend(python, overlay, VIRTUAL_ENV=str(site_packages.parents[2]), PIP_BUILD_TRACKER="/tmp")
    assert finished.returncode == 1
    assert "no torch in" in finished.stderr


def test_missing_torch_is_three_lines_that_name_both_remedies(environments, overlay):
    python, site_packages = environments("target")
    finished = run_backend(python, overlay, PIP_BUILD_TRACKER="/tmp")
    assert finished.returncode == 1
    lines = finished.stderr.strip().splitlines()
    assert len(lines) == 3
    assert f"no torch in {site_packages.parents[2]}" in lines[0]
    assert "pip install 'torch>=2.11,<2.16'" in lines[1]
    assert "--no-build-isolation" in lines[2]


def test_a_tool_that_hides_the_environment_is_sent_to_pip(environments, overlay):
    python, _ = environments("build")
    finished = run_backend(python, overlay)
    assert finished.returncode == 1
    assert "Either install with pip, in an environment that has torch:  pip install ." in finished.stderr


@pytest.mark.parametrize("version", ["2.10.2", "2.16.0", "3.0.0+cu140"])
def test_unsupported_torch_is_refused_by_name(environments, overlay, version):
    python, site_packages = environments("target")
    install_fake_torch(site_packages, version)
    finished = run_backend(python, overlay, PIP_BUILD_TRACKER="/tmp")
    assert finished.returncode == 1
    assert f"torch {version} is installed" in finished.stderr
    assert "expected torch>=2.11,<2.16" in finished.stderr


def test_old_setuptools_without_isolation_is_told_what_to_install(environments):
    python, site_packages = environments("target")
    (site_packages / "setuptools").mkdir()
    (site_packages / "setuptools" / "__init__.py").write_text("")
    (site_packages / "setuptools" / "version.py").write_text("__version__ = '65.5.0'\n")
    (site_packages / "setuptools" / "build_meta.py").write_text("")
    finished = run([python, "-c", "import build_backend"], PYTHONPATH=str(ROOT / "tools"))
    assert finished.stderr.strip().endswith("pip install 'setuptools>=77' wheel cmake ninja")


def test_torch_is_no_build_requirement():
    (requires,) = re.findall(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert "setuptools" in requires
    assert "torch" not in requires


def test_source_distribution_holds_what_a_build_needs_and_nothing_built(tmp_path):
    code = "import sys; sys.path.insert(0, 'tools'); import build_backend; build_backend.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".md"}
    assert sources | {"CMakeLists.txt", "tools/build_backend.py", "dlkernels/py.typed", "dlkernels/_C.pyi"} <= packed
    assert "dlkernels/_build_info.py" not in packed
    assert [name for name in packed if name.endswith(".so")] == []


# ---- Importing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def import_package(tmp_path):
    """Returns import_package(files): imports a copy of dlkernels holding `files`, under a torch 2.13.0 for CUDA 13."""

    def import_copy(files):
        built = shutil.ignore_patterns("_C.*", "_build_info.py")
        shutil.copytree(ROOT / "dlkernels", tmp_path / "dlkernels", ignore=built)
        (tmp_path / "torch").mkdir()
        version = "class version:\n    cuda = '13.0'\n"
        (tmp_path / "torch" / "__init__.py").write_text(f"__version__ = '2.13.0+cpu'\n{version}")
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        # -S: an editable installation would supply whatever module the copy lacks.
        return run([sys.executable, "-S", "-c", "import dlkernels"], PYTHONPATH=str(tmp_path))

    return import_copy


def build_info(torch_version, **facts):
    return f"BUILD_INFO = { ({'dlkernels': '0.1.0', 'torch': torch_version} | facts)!r}\n"


def test_extension_for_another_torch_says_which_and_what_to_run(import_package):
    finished = import_package({"dlkernels/_build_info.py": build_info("2.12.0"), "dlkernels/_C.py": ""})
    assert finished.stderr.strip().splitlines()[-1] == (
        "ImportError: dlkernels 0.1.0 was compiled for torch 2.12.0, you have 2.13.0+cpu; "
        "run: pip install --force-reinstall --no-cache-dir --no-build-isolation dlkernels"
    )


def test_kernels_of_another_cuda_say_which_and_what_to_run(import_package):
    facts = build_info("2.13.0+cpu", cuda="12.8")
    finished = import_package({"dlkernels/_build_info.py": facts, "dlkernels/_C.py": "raise ImportError('too late')"})
    assert finished.stderr.strip().splitlines()[-1] == (
        "ImportError: dlkernels 0.1.0 was compiled for CUDA 12.8, your torch is for CUDA 13.0; "
        "run: DLKERNELS_CUDA=1 pip install --force-reinstall --no-cache-dir --no-build-isolation dlkernels"
    )


@pytest.mark.parametrize("cuda", [None, "13.0", "13.2"])
def test_kernels_of_the_same_cuda_or_of_none_are_loaded(import_package, cuda):
    facts = build_info("2.13.0+cpu", cuda=cuda)
    finished = import_package({"dlkernels/_build_info.py": facts, "dlkernels/_C.py": "raise ImportError('loaded')"})
    assert finished.stderr.strip().splitlines()[-1] == "ImportError: loaded"


def test_extension_for_another_python_says_which_and_what_to_run(import_package):
    facts = build_info("2.13.0+cpu", python="3.9.18")
    finished = import_package({"dlkernels/_build_info.py": facts})
    assert finished.stderr.strip().splitlines()[-1] == (
        f"ImportError: dlkernels 0.1.0 was compiled for Python 3.9.18, you have {platform.python_version()}; "
        "run: pip install --force-reinstall --no-cache-dir --no-build-isolation dlkernels"
    )


def test_undefined_symbol_is_reported_as_a_mismatch(import_package):
    broken = "raise ImportError('_C.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationE')\n"
    finished = import_package({"dlkernels/_build_info.py": build_info("2.13.0+cpu"), "dlkernels/_C.py": broken})
    assert "undefined symbol: _ZN3c105ErrorC2" in finished.stderr
    assert "dlkernels 0.1.0 was compiled for torch 2.13.0+cpu" in finished.stderr.strip().splitlines()[-1]
    assert "--force-reinstall" in finished.stderr.strip().splitlines()[-1]


def test_other_import_errors_of_the_extension_stay_what_they_are(import_package):
    broken = "raise ImportError('libgomp.so.1: cannot open shared object file')\n"
    finished = import_package({"dlkernels/_build_info.py": build_info("2.13.0+cpu"), "dlkernels/_C.py": broken})
    assert finished.stderr.strip().endswith("ImportError: libgomp.so.1: cannot open shared object file")


@pytest.mark.parametrize(
    "files",
    [{}, {"dlkernels/_build_info.py": build_info("2.13.0+cpu", python=platform.python_version())}],
    ids=["nothing", "no extension"],
)
def test_missing_extension_says_what_to_run(import_package, files):
    finished = import_package(files)
    assert "no compiled extension" in finished.stderr.strip().splitlines()[-1]
    assert "run: pip install" in finished.stderr.strip().splitlines()[-1]


def test_missing_extension_in_a_checkout_names_make_dev(import_package, tmp_path):
    (tmp_path / "CMakeLists.txt").touch()
    finished = import_package({})
    assert f"run: make -C {tmp_path} dev" in finished.stderr.strip().splitlines()[-1]


def test_import_leaves_the_optional_libraries_alone():
    code = "import sys, dlkernels; print(sorted({'typer', 'rich', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    finished = run([sys.executable, "-c", code], PYTHONPATH=str(ROOT))
    assert finished.stdout.strip() == "[]", finished.stderr


def test_build_facts_describe_the_running_torch():
    from dlkernels._build_info import BUILD_INFO

    assert BUILD_INFO["torch"] == torch.__version__
    assert BUILD_INFO["cxx11_abi"] == torch.compiled_with_cxx11_abi()
    assert BUILD_INFO["instruction_sets"][0] == "baseline"
    assert BUILD_INFO["cuda"] is None or re.fullmatch(r"\d+\.\d+", BUILD_INFO["cuda"])
    assert BUILD_INFO["cuda_reason"]
    assert set(BUILD_INFO) == {
        "dlkernels", "torch", "cxx11_abi", "python", "compiler", "instruction_sets", "cuda", "cuda_reason",
    }  # fmt: skip
    json.dumps(BUILD_INFO)


def parameters(definition):
    return [argument.arg for argument in [*definition.args.args, *definition.args.kwonlyargs]]


def test_stub_names_every_function_of_the_extension_and_its_arguments():
    from dlkernels import _C

    stub = ast.parse((ROOT / "dlkernels" / "_C.pyi").read_text())
    stubbed = {node.name: parameters(node) for node in stub.body if isinstance(node, ast.FunctionDef)}
    functions = {name: getattr(_C, name) for name in dir(_C) if not name.startswith("_")}
    # pybind11 writes the signature into the first line of a function's documentation.
    signatures = {
        name: ast.parse(f"def {function.__doc__.splitlines()[0]}: ...") for name, function in functions.items()
    }
    assert stubbed == {name: parameters(module.body[0]) for name, module in signatures.items()}, "run: make stub"


# ---- What the compiler was told, and what it made --------------------------------------------------------------------


@pytest.fixture(scope="module")
def compile_commands():
    path = BUILD / "compile_commands.json"
    if not path.exists():
        pytest.skip("dlkernels was not built in this checkout")
    entries = json.loads(path.read_text())
    return {f"{entry['output']} from {entry['file']}": entry["command"] for entry in entries}


def test_no_file_is_compiled_with_fast_math(compile_commands):
    unsafe = r"-Ofast|-f(fast-math|unsafe-math|finite-math|associative-math|reciprocal-math|no-signed-zeros|no-honor)"
    assert [file for file, command in compile_commands.items() if re.search(unsafe, command)] == []


KERNEL_FOLDERS = re.compile(r"/csrc/(cpu|cuda)/|/tests/simt/")


def test_files_with_torch_are_compiled_with_openmp(compile_commands):
    with_torch = {file: command for file, command in compile_commands.items() if not KERNEL_FOLDERS.search(file)}
    assert with_torch
    assert [file for file, command in with_torch.items() if "-fopenmp" not in command] == []


def test_kernels_are_compiled_without_torch(compile_commands):
    kernels = {file: command for file, command in compile_commands.items() if KERNEL_FOLDERS.search(file)}
    assert kernels
    assert [file for file, command in kernels.items() if "torch/include" in command] == []


def symbols(object_file, *options):
    listing = subprocess.run(["nm", "--extern-only", *options, object_file], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in listing.stdout.splitlines() if line.strip()]


def kernel_objects(isa):
    objects = sorted((BUILD / "CMakeFiles" / f"kernels_{isa}.dir").rglob("*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip(f"no {isa} objects in this checkout, or no nm to read them")
    return objects


@pytest.mark.parametrize("isa", WIDE_ISAS)
def test_wide_objects_define_symbols_in_their_own_namespace_only(isa):
    """The linker keeps one copy of an inline function; the AVX-512 copy of std::max would run on every machine."""
    own = re.compile(rf"_Z(GV|GR|T[VTSI])?(Z*)N[KVRO]*9dlkernels{len(isa)}{isa}")
    foreign = {
        f"{path.name}: {name}"
        for path in kernel_objects(isa)
        for name in symbols(path, "--defined-only")
        if not own.match(name) and not name.startswith("DW.ref.")
    }
    assert foreign == set()


@pytest.mark.parametrize("isa", ["baseline", *WIDE_ISAS])
def test_kernels_call_nothing_of_torch(isa):
    for path in kernel_objects(isa):
        assert [name for name in symbols(path, "--undefined-only") if re.match(r"_ZNK?(2at|3c10|5torch)", name)] == []


# ---- Real installations: minutes when nothing is compiled yet, seconds when `make dev` has run -----------------------


@pytest.fixture
def installation(tmp_path):
    """Returns install(*arguments): runs pip in a new environment that sees our torch; gives (python, process)."""
    environment = tmp_path / "environment"
    python = environment / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)

    def install(*arguments, with_torch=True):
        if with_torch:
            (site_packages,) = environment.glob("lib/python*/site-packages")
            (site_packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        # The same ninja throughout, so that what one installation compiled serves the next.
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        (ROOT / "build").mkdir(exist_ok=True)
        with open(ROOT / "build" / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return python, run([python, "-m", "pip", "install", "--no-deps", *arguments], PATH=path)

    return install


def extension_imported_by(python):
    code = "import torch, dlkernels; print(torch.__version__, dlkernels._C.__file__)"
    finished = run([python, "-c", code])
    assert finished.returncode == 0, finished.stderr
    version, path = finished.stdout.split()
    assert version == torch.__version__
    return Path(path)


@pytest.mark.slow
def test_isolated_wheel_runs_on_the_environments_torch(installation):
    python, finished = installation(ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert python.parents[1] in extension_imported_by(python).parents


@pytest.mark.slow
def test_wheel_without_isolation(installation):
    installation("--force-reinstall", f"setuptools=={setuptools.__version__}")
    python, finished = installation("--no-build-isolation", ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert python.parents[1] in extension_imported_by(python).parents


@pytest.mark.slow
@pytest.mark.parametrize("isolation", [[], ["--no-build-isolation"]], ids=["isolated", "not isolated"])
def test_editable_installation_runs_from_the_checkout(installation, isolation):
    installation("--force-reinstall", f"setuptools=={setuptools.__version__}")
    python, finished = installation(*isolation, "--editable", ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert extension_imported_by(python).parent == ROOT / "dlkernels"


@pytest.mark.slow
def test_isolated_installation_without_torch_stops_before_compiling(installation):
    _, finished = installation(ROOT, with_torch=False)
    assert finished.returncode == 1
    assert "no torch in" in finished.stdout + finished.stderr
    assert "Building wheel" not in finished.stdout
