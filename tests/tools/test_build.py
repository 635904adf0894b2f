"""Installing: with a compiler, without one, and demanding one. Each build works on a copy of the sources."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import venv

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def sources(tmp_path):
    """What an sdist holds, without anything built."""
    copy = tmp_path / "sources"
    for folder in ("csrc", "contextrast_kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def run_setup(sources, *arguments, **environment):
    command = [sys.executable, "setup.py", *arguments]
    environment = os.environ | {"CONTEXTRAST_NATIVE": ""} | environment
    return subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True)


def wheel_of(folder):
    [wheel] = folder.glob("*.whl")
    return wheel.name


def test_setup_does_not_import_torch(sources):
    program = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program, "--name"], cwd=sources, capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["contextrast-kernels"], done.stderr


def test_an_old_setuptools_fails_with_the_required_version(sources):
    """As `pip install --no-build-isolation` runs it, before setuptools reads pyproject.toml."""
    program = (
        "import runpy, sys, types; old = types.ModuleType('setuptools'); old.__version__ = '65.5.0'; "
        "sys.modules['setuptools'] = old; runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=sources, capture_output=True, text=True)
    assert done.returncode != 0
    [sentence] = done.stderr.splitlines()
    assert "expected setuptools 77 or newer, got 65.5.0. Run pip install 'setuptools>=77'" in sentence
    required = (sources / "pyproject.toml").read_text()
    assert '"setuptools>=77"' in required


def test_the_sdist_holds_what_its_tests_need(sources):
    for folder in ("tests", "examples", "benchmarks", "docs"):
        shutil.copytree(ROOT / folder, sources / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("MANIFEST.in", "Makefile", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, sources)
    done = run_setup(sources, "sdist", CONTEXTRAST_NATIVE="0")
    assert done.returncode == 0, done.stderr
    [archive] = (sources / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {pathlib.PurePosixPath(*pathlib.PurePosixPath(name).parts[1:]) for name in tar.getnames()}
    wanted = {
        path.relative_to(sources)
        for folder in ("csrc", "contextrast_kernels", "tests", "examples", "benchmarks", "docs")
        for path in (sources / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted = {pathlib.PurePosixPath(path) for path in wanted}
    assert pathlib.PurePosixPath("tests/conftest.py") in wanted
    assert wanted <= held, wanted - held


def test_without_a_compiler_the_wheel_is_pure_and_a_warning_says_why(sources):
    done = run_setup(sources, "bdist_wheel", CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stdout + done.stderr
    assert wheel_of(sources / "dist").endswith("-py3-none-any.whl")
    [sentence] = [line for line in done.stderr.splitlines() if "contextrast_kernels: the" in line]
    assert "the native library was not built: " in sentence
    assert "/nonexistent/c++" in sentence


def test_requiring_the_library_without_a_compiler_fails_with_the_reason(sources):
    done = run_setup(sources, "bdist_wheel", CXX="/nonexistent/c++", CONTEXTRAST_NATIVE="1")
    assert done.returncode != 0
    assert "the native library was not built (required by CONTEXTRAST_NATIVE=1): " in done.stderr.splitlines()[-1]
    assert not (sources / "dist").exists()


def test_declining_the_library_builds_nothing(sources):
    done = run_setup(sources, "bdist_wheel", CONTEXTRAST_NATIVE="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert wheel_of(sources / "dist").endswith("-py3-none-any.whl")
    assert not (sources / "build" / "native").exists()


STATUS = "from contextrast_kernels import native; print(native.__file__); print(native.status('cpu'))"


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True])
def test_pip_installs_the_library_beside_its_module(sources, tmp_path, editable):
    """pip builds without isolation, as on a machine without a network. The new environment sees this one's packages."""
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=True)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", query], check=True, capture_output=True, text=True).stdout.strip()
    lent = subprocess.run([sys.executable, "-c", query], check=True, capture_output=True, text=True).stdout.strip()
    pathlib.Path(site, "lent.pth").write_text(f"{lent}\n")
    install = ["-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--force-reinstall"]
    done = subprocess.run(
        [python, *install, *(["--editable"] if editable else []), sources],
        env=os.environ | {"CONTEXTRAST_NATIVE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([python, "-c", STATUS], cwd=tmp_path, capture_output=True, text=True)
    module, status = done.stdout.split("\n")[:2]
    assert status == "ok", done.stdout + done.stderr
    installed = pathlib.Path(module).parent
    assert (installed / "_native.so").exists()
    assert (sources in installed.parents) == editable
