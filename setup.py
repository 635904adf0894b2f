"""Build the Python package and, if the tools are found, the native library inside it.

csrc/ needs a C++17 compiler, and its CUDA kernels nvcc. CMakeLists.txt has the sources and flags. The environment
variable CONTEXTRAST_NATIVE controls a failed native build: by default warn and continue, because the package works
without it; 1: fail the installation; 0: do not build the library.
"""

import itertools
import os
import pathlib
import shutil
import subprocess
import sys

import setuptools

LEAST_SETUPTOOLS = 77  # as in pyproject.toml; older versions cannot read its licence entry
if int(setuptools.__version__.split(".")[0]) < LEAST_SETUPTOOLS:
    sys.exit(
        f"contextrast_kernels: expected setuptools {LEAST_SETUPTOOLS} or newer, got {setuptools.__version__}. "
        f"Run pip install 'setuptools>={LEAST_SETUPTOOLS}', or do not use --no-build-isolation."
    )

from setuptools import Command, Distribution, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build import build  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent
LIBRARY = pathlib.Path("contextrast_kernels", "_native.so")


class BuildFailed(Exception):
    pass


def find_tool(name: str, folders: list[str]) -> str | None:
    return shutil.which(name) or next(filter(None, (shutil.which(name, path=folder) for folder in folders)), None)


def build_tool(name: str) -> str:
    found = find_tool(name, [os.path.dirname(sys.executable)])
    if found is None:
        raise BuildFailed(f"{name} was not found. Install it: pip install {name}.")
    return found


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return find_tool("nvcc", [os.path.join(home, "bin") for home in homes if home])


def reason(output: str) -> str:
    """The first error in the output of CMake or a compiler, in one line."""
    lines = output.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):  # its text follows, indented
            text = itertools.takewhile(lambda line: not line.strip() or line.startswith(" "), lines[i + 1 :])
            return " ".join(" ".join(text).split()) or line
        if "error:" in line or ": fatal" in line:
            return line.strip()
    return lines[-1] if lines else "no output"


def run(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        raise BuildFailed(reason(done.stdout))


def build_library(target: pathlib.Path, nvcc: str | None) -> None:
    cmake, ninja = build_tool("cmake"), build_tool("ninja")
    work = ROOT / "build" / "native"
    shutil.rmtree(work, ignore_errors=True)  # a cache may name tools of a deleted environment
    options = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCONTEXTRAST_CUDA={'ON' if nvcc else 'OFF'}"]
    if nvcc:
        options.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
    run(cmake, "-S", ROOT, "-B", work, "-G", "Ninja", *options)
    run(cmake, "--build", work)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A process may have the old library open, so replace the file and not its content.
    fresh = target.with_suffix(".new")
    shutil.copy2(work / LIBRARY.name, fresh)
    os.replace(fresh, target)


class build_native(Command):
    """Put the library into the package in the build folder or, for `pip install -e`, in the sources."""

    user_options = []  # noqa: RUF012, setuptools reads it from the class
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def target(self) -> pathlib.Path:
        return (ROOT if self.editable_mode else pathlib.Path(self.build_lib)) / LIBRARY

    def run(self):
        wish = os.environ.get("CONTEXTRAST_NATIVE", "")
        if wish == "0":
            return
        failures = []
        for nvcc in dict.fromkeys([find_nvcc(), None]):  # if the CUDA kernels fail, the CPU code may still build
            try:
                build_library(self.target(), nvcc)
            except (BuildFailed, OSError) as failure:
                failures.append(failure)
                continue
            self.distribution.has_library = True
            break
        if failures:
            part = "CUDA kernels were" if self.distribution.has_library else "native library was"
            required = " (required by CONTEXTRAST_NATIVE=1)" if wish == "1" else ""
            message = f"contextrast_kernels: the {part} not built{required}: {failures[-1]}"
            if required:
                sys.exit(message)
            print(message, file=sys.stderr)

    def get_source_files(self):
        return ["CMakeLists.txt", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").iterdir()))]

    def get_outputs(self):
        return [str(self.target())] if self.distribution.has_library else []

    def get_output_mapping(self):
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012


class Wheel(bdist_wheel):
    def run(self):
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_library
        super().run()

    def get_tag(self):
        # The library uses no Python symbol, so one wheel serves every Python.
        return ("py3", "none", super().get_tag()[2] if self.distribution.has_library else "any")


class Package(Distribution):
    has_library = False

    def has_ext_modules(self):
        return self.has_library


setup(distclass=Package, cmdclass={"build": Build, "build_native": build_native, "bdist_wheel": Wheel})
