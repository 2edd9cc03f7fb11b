"""What an installation promises: it imports without Triton, nvcc or a GPU, and knows how it was built."""

from __future__ import annotations

import email
import functools
import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from perceiver_kernels import build_info
from perceiver_kernels.version import __version__

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_CUDA = os.environ | {"PERCEIVER_KERNELS_BUILD_CUDA": "0"}

HIDE_TRITON = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] == "triton" else find(name, *rest)
"""


def is_installed(distribution: str) -> bool:
    return any(importlib.metadata.distributions(name=distribution))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def setup_module_functions(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The names of setup.py, without its call of setup()."""
    pytest.importorskip("setuptools")
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


class TestImport:
    def test_without_triton_the_package_works_and_says_so(self):
        code = """
import json, torch
import perceiver_kernels as pk
content = torch.randn(2, 7, 5)
packed = pk.pack_inputs(content)
assert "triton" not in {name.partition(".")[0] for name in sys.modules}
print(json.dumps([pk.backends()["triton"], list(packed.data.shape)]))
"""
        result = run_python(HIDE_TRITON + code, TRITON_INTERPRET="0")
        assert result.returncode == 0, result.stderr
        (available, reason), shape = json.loads(result.stdout)
        assert not available
        assert "triton" in reason
        assert shape == [2, 7, 16]

    def test_without_gpu_and_compiler_cuda_gives_its_reason(self):
        code = "import json, perceiver_kernels as pk; print(json.dumps(pk.backends()))"
        result = run_python(code, CUDA_VISIBLE_DEVICES="", PATH="")
        assert result.returncode == 0, result.stderr
        answer = json.loads(result.stdout)
        assert answer["reference"][0] and answer["sdpa"][0]
        assert not answer["cuda"][0]
        assert answer["cuda"][1]

    def test_import_loads_no_optional_part(self):
        code = """
import sys
import perceiver_kernels
optional = ("cli", "testing", "models", "_C")
print([name for name in sys.modules if name.startswith(tuple(f"perceiver_kernels.{part}" for part in optional))])
"""
        result = run_python(code)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == "[]"

    def test_type_information_is_marked(self):
        assert (build_info.PACKAGE / "py.typed").is_file()


class TestBuildInfo:
    def test_record_is_complete(self):
        info = build_info.read()
        if info["cuda_built"]:
            assert info["reason"] is None
            assert set(info) == {"cuda_built", "reason", "archs", "nvcc", "source_hash", "kernels"}
        else:
            assert info["reason"]

    def test_missing_record_is_a_reason(self, monkeypatch, tmp_path):
        monkeypatch.setattr(build_info, "PACKAGE", tmp_path)
        assert build_info.read() == build_info.NOT_BUILT

    def test_source_hash_follows_names_and_contents(self, tmp_path):
        (tmp_path / "csrc").mkdir()
        (tmp_path / "CMakeLists.txt").write_text("")
        source = tmp_path / "csrc" / "a.cu"
        hashes = []
        for text in ("one", "two", "one"):
            source.write_text(text)
            hashes.append(build_info.source_hash(tmp_path))
        source.rename(source.with_name("b.cu"))
        hashes.append(build_info.source_hash(tmp_path))
        assert hashes[0] == hashes[2]
        assert len(set(hashes)) == 3

    def test_changed_sources_make_a_build_stale(self, monkeypatch, tmp_path):
        (tmp_path / "csrc").mkdir()
        (tmp_path / "CMakeLists.txt").write_text("")
        monkeypatch.setattr(build_info, "PACKAGE", tmp_path / "perceiver_kernels")
        info = {"cuda_built": True, "source_hash": build_info.source_hash(tmp_path)}
        assert not build_info.is_stale(info)
        (tmp_path / "csrc" / "new.cu").write_text("")
        assert build_info.is_stale(info)


class TestSetup:
    def test_switch_takes_three_values(self, monkeypatch):
        monkeypatch.setenv("PERCEIVER_KERNELS_BUILD_CUDA", "yes")
        with pytest.raises(SystemExit, match="must be auto, 1 or 0, got 'yes'"):
            setup_module_functions(monkeypatch)

    def test_zero_builds_nothing_and_says_why(self, monkeypatch):
        monkeypatch.setenv("PERCEIVER_KERNELS_BUILD_CUDA", "0")
        setup = setup_module_functions(monkeypatch)
        assert setup["TOOLS"] is None
        assert "PERCEIVER_KERNELS_BUILD_CUDA=0" in setup["REASON"]

    @pytest.mark.parametrize("choice", ["auto", "1"])
    def test_missing_nvcc_is_recorded_or_fatal(self, monkeypatch, choice):
        monkeypatch.setenv("PERCEIVER_KERNELS_BUILD_CUDA", choice)
        monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
        monkeypatch.setattr(os, "access", lambda *_: False)
        if choice == "1":
            with pytest.raises(SystemExit, match="PERCEIVER_KERNELS_BUILD_CUDA=1, but no CUDA compiler"):
                setup_module_functions(monkeypatch)
        else:
            assert "no CUDA compiler" in setup_module_functions(monkeypatch)["REASON"]

    def test_failing_command_ends_the_build_with_its_output(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PERCEIVER_KERNELS_BUILD_CUDA", "0")
        run_logged = setup_module_functions(monkeypatch)["run_logged"]
        command = [sys.executable, "-c", "print('line of the compiler'); raise SystemExit(3)"]
        with pytest.raises(SystemExit, match="line of the compiler"):
            run_logged(command, tmp_path / "build.log")
        assert "line of the compiler" in (tmp_path / "build.log").read_text()

    def test_jobs_honour_max_jobs(self, monkeypatch):
        monkeypatch.setenv("PERCEIVER_KERNELS_BUILD_CUDA", "0")
        job_count = setup_module_functions(monkeypatch)["job_count"]
        assert job_count() >= 1
        monkeypatch.setenv("MAX_JOBS", "3")
        assert job_count() == 3

    def test_ptxas_report_takes_the_last_compilation(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PERCEIVER_KERNELS_BUILD_CUDA", "0")
        report = setup_module_functions(monkeypatch)["ptxas_report"]

        def entry(name, arch, registers, spilled):
            return (
                f"ptxas info    : Compiling entry function '{name}' for '{arch}'\n"
                f"    16 bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads\n"
                f"ptxas info    : Used {registers} registers, used 1 barriers\n"
            )

        log = tmp_path / "build.log"
        log.write_text(
            entry("a", "sm_80", 64, 8) + entry("a", "sm_90a", 40, 4) + "ptxas warning : C7510 serialised\n"
        )
        with log.open("a") as file:
            file.write(entry("a", "sm_80", 96, 0))
        assert report(log) == {
            "count": 2, "max_registers": 96, "spilling": ["a sm_90a"], "warnings": ["ptxas warning : C7510 serialised"],
        }  # fmt: skip


class TestMetadata:
    def test_installed_version_is_the_package_version(self):
        if not is_installed("perceiver-kernels"):
            pytest.skip("the package runs from its source tree, not installed")
        assert importlib.metadata.version("perceiver-kernels") == __version__

    def test_torch_is_no_build_requirement(self):
        build_system = (ROOT / "pyproject.toml").read_text().partition("[project]")[0]
        (requires,) = [line for line in build_system.splitlines() if line.startswith("requires")]
        assert "setuptools" in requires
        assert "torch" not in requires

    def test_version_is_written_once(self):
        """pyproject.toml reads it from version.py; the changelog names it in a heading."""
        project = (ROOT / "pyproject.toml").read_text()
        assert 'version = { attr = "perceiver_kernels.version.__version__" }' in project
        others = ("pyproject.toml", "setup.py", "CMakeLists.txt", "Makefile", "mkdocs.yml", "README.md")
        sources = [*(ROOT / name for name in others), *(ROOT / "perceiver_kernels").rglob("*.py")]
        version = re.compile(rf"(?<![\d.]){re.escape(__version__)}(?![\d.])")
        written = [path.name for path in sources if version.search(path.read_text())]
        assert written == ["version.py"]
        assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == __version__


FOLDERS = ("benchmarks", "csrc", "docs", "examples", "perceiver_kernels", "tests")
PRODUCTS = ("__pycache__/conftest.pyc", ".benchmarks/machine/0001.json", "_C.so", build_info.FILE_NAME)
"""What building and testing leave in a source tree."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources alone, in which products of builds lie about."""
    tree = tmp_path_factory.mktemp("source") / "tree"
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("*.so", "__pycache__", ".*", build_info.FILE_NAME)
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tree)
    for product in (tree / name / product for name in FOLDERS for product in PRODUCTS):
        product.parent.mkdir(parents=True, exist_ok=True)
        product.touch()
    return tree


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not is_installed("setuptools"):
        pytest.skip("setuptools is not installed")
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, env=WITHOUT_CUDA, timeout=300)
    (archive,) = folder.glob(f"perceiver_kernels-{__version__}.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of the source distribution, as a user without a wheel builds it."""
    if not is_installed("pip"):
        pytest.skip("pip is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(folder), str(sdist)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=WITHOUT_CUDA, timeout=300)
    (built,) = folder.glob(f"perceiver_kernels-{__version__}-py3-none-any.whl")
    return built


def files_of(archive: Path) -> set[str]:
    """Names in a wheel, or in a source distribution without its folder."""
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as content:
        return {str(Path(*Path(member.name).parts[1:])) for member in content if member.isfile()}


class TestDistributions:
    def test_source_distribution_holds_the_tree(self, tree, sdist):
        """setuptools alone takes tests/test*.py: tests without conftest.py, benchmarks and the documents that they read."""
        products = {str(Path(name, product)) for name in FOLDERS for product in PRODUCTS}
        files = (path for path in tree.rglob("*") if path.is_file() and not path.parent.name.endswith(".egg-info"))
        held, names = {str(path.relative_to(tree)) for path in files} - products, files_of(sdist)
        assert held <= names
        assert {name for name in names - held if "egg-info" not in name} == {"PKG-INFO", "setup.cfg"}

    def test_pure_wheel_holds_the_package_alone(self, wheel):
        names = files_of(wheel)
        assert f"perceiver_kernels/{build_info.FILE_NAME}" in names
        assert {name.partition("/")[0].partition("-")[0] for name in names} == {"perceiver_kernels"}
        assert not [name for name in names if name.endswith(".so")]
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / "perceiver_kernels").rglob("*.py")}
        assert {name for name in names if name.endswith(".py")} == sources

    def test_type_information_is_in_both(self, sdist, wheel):
        assert "perceiver_kernels/py.typed" in files_of(sdist) & files_of(wheel)

    def test_wheel_says_what_it_needs(self, wheel):
        (path,) = [name for name in files_of(wheel) if name.endswith(".dist-info/METADATA")]
        told = email.message_from_bytes(zipfile.ZipFile(wheel).read(path))
        assert told["Version"] == __version__
        assert "Apache-2.0" in (told["License"], told["License-Expression"])
        assert told["Requires-Python"] == ">=3.10"
        assert {"cli", "convert", "docs", "examples", "test"} <= set(told.get_all("Provides-Extra"))
        plain = [line for line in told.get_all("Requires-Dist") if "extra ==" not in line]
        assert {re.match(r"[\w-]+", line)[0] for line in plain} == {"torch", "triton"}

    @pytest.mark.parametrize("source", ["wheel", "sdist"])
    def test_installs_with_its_command(self, source, wheel, sdist, tmp_path):
        """Into a new environment that sees this one's packages, this package left out; nothing is downloaded."""
        for name in ("torch", "rich", "matplotlib", "scikit-image", "psutil"):
            if not is_installed(name):
                pytest.skip(f"{name} is not installed")
        python = new_environment(tmp_path)
        install = ["install", "--no-index", "--no-build-isolation", f"{wheel if source == 'wheel' else sdist}[cli]"]
        command = [sys.executable, "-m", "pip", "--python", str(python), *install]
        environment = {name: value for name, value in WITHOUT_CUDA.items() if name != "PYTHONPATH"}
        run = functools.partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        installed = run(command)
        assert installed.returncode == 0, installed.stdout + installed.stderr
        told = run([str(python.with_name("perceiver-kernels")), "info", "--json", "-"])
        assert told.returncode == 0, told.stderr
        assert json.loads(told.stdout)["environment"]["perceiver_kernels"] == __version__
        assert run([str(python.with_name("perceiver-kernels")), "--version"]).stdout == f"perceiver-kernels {__version__}\n"
        where = run([str(python), "-c", "import perceiver_kernels; print(perceiver_kernels.__file__)"])
        assert Path(where.stdout).is_relative_to(tmp_path / "environment")


def new_environment(folder: Path) -> Path:
    """Make one without packages of its own; a .pth file shows it this one's, but for this package. Return its Python."""
    venv.create(folder / "environment", with_pip=False, symlinks=True)
    python = folder / "environment" / "bin" / "python"
    shown = folder / "shown"
    shown.mkdir()
    for entry in (entry for path in sys.path if Path(path).name.endswith("-packages") for entry in Path(path).iterdir()):
        link = shown / entry.name
        if "perceiver_kernels" not in entry.name and entry.suffix != ".pth" and not link.exists():
            link.symlink_to(entry)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    Path(purelib, "shown.pth").write_text(f"{shown}\n")
    return python
