"""The file of the native library: why it cannot be opened, what it exports, what it cannot take, and its tests under
AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from inputs import scene

import contextrast_kernels as ck
from contextrast_kernels import native
from contextrast_kernels.backend import _warn_once
from contextrast_kernels.bane import layer_negatives

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(native.status("cpu") != "ok", reason=f"native, cpu: {native.status('cpu')}")


@pytest.fixture
def unopened(monkeypatch):
    """Clear the caches of the library before and after a test, as if it had not been opened."""
    native._library.cache_clear()
    native.status.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native._library.cache_clear()
    native.status.cache_clear()


def test_the_status_says_that_the_library_is_missing(unopened, tmp_path):
    unopened.setattr(native, "_PATH", tmp_path / "_native.so")
    assert "not built" in native.status("cpu")
    assert "CONTEXTRAST_NATIVE=1" in native.status("cuda")
    with pytest.raises(RuntimeError, match="not built"):
        native.edge_distance(torch.zeros(1, 2, 2, dtype=torch.int64), True)
    assert ck.edge_distance(torch.zeros(1, 2, 2, dtype=torch.int64)).isinf().all()  # the reference takes over


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_the_status_says_that_the_library_cannot_be_opened(unopened, tmp_path, content):
    path = tmp_path / "_native.so"
    path.write_bytes(content)
    unopened.setattr(native, "_PATH", path)
    assert "cannot be opened" in native.status("cpu")


def test_the_status_says_that_the_library_has_another_version(unopened):
    unopened.setattr(native, "_INTERFACE", native._INTERFACE + 1)
    assert "another version of csrc/" in native.status("cpu")


def test_only_the_interface_is_exported():
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    lines = subprocess.run(
        [nm, "-D", "--defined-only", native._PATH], check=True, capture_output=True, text=True
    ).stdout
    names = {line.split()[-1] for line in lines.splitlines()}
    assert {name for name in names if not name.startswith("contextrast_")} == set()
    assert "contextrast_edge_distance_cpu" in names


def test_cpu_call_does_not_initialise_cuda(monkeypatch):
    """A data loader's worker, forked from a process that uses CUDA, must be able to measure distances."""

    def refuse(*_):
        raise AssertionError("CUDA was asked")

    for name in ("is_available", "current_device", "current_stream", "device_count", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    native.status.cache_clear()
    classes = torch.tensor([[[0, 0, 0, 1]]])
    with ck.backend("native"):
        assert ck.edge_distance(classes, squared=True).tolist() == [[[4, 1, 0, 0]]]


# --------------------------------------------------------------------------------------------- more than it can take


@pytest.mark.parametrize("distance_at", ["layer", "full"])
def test_more_layers_than_one_call_takes_are_chosen_layer_by_layer(rng, distance_at):
    labels, predictions = scene(rng, B=2, N=5, H=20, W=24)
    sizes = [(20 - i, 24 - i) for i in range(native.MOST_LAYERS + 1)]
    results = []
    for backend in ("native", "reference"):
        with ck.backend(backend):
            results.append(
                layer_negatives(predictions, labels, sizes, 5, 0.3, "bane", distance_at, 255, torch.tensor(4))
            )
    (layers, counts), (expected, expected_counts) = results
    assert all(torch.equal(layer, other) for layer, other in zip(layers, expected, strict=True))
    assert torch.equal(counts, expected_counts)


def test_more_classes_than_the_library_takes_run_on_the_reference(rng, monkeypatch):
    monkeypatch.delenv("CONTEXTRAST_BACKEND", raising=False)
    labels, predictions = scene(rng, B=2, N=5, H=20, W=24)
    calls = [
        lambda N: ck.bane_negatives(predictions, labels, num_classes=N),
        lambda N: ck.select_nearest(labels, labels, 0.3, num_classes=N),
    ]
    _warn_once.cache_clear()
    for choose in calls:
        expected = choose(native.MOST_CLASSES)
        with pytest.warns(RuntimeWarning, match="at most 1048576 classes, got 1048577"):
            assert torch.equal(choose(native.MOST_CLASSES + 1), expected)
        _warn_once.cache_clear()
        with ck.backend("native"), pytest.raises(RuntimeError, match=r"^backend: .*got 'native': .* got 1048577\. Use"):
            choose(native.MOST_CLASSES + 1)


# ----------------------------------------------------------------------------------------------------------- sanitizers

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@pytest.fixture(scope="session")
def compiler():
    if COMPILER is None:
        pytest.skip("no C++ compiler: neither CXX, c++ nor g++")
    probe = [COMPILER, "-fsanitize=address,undefined", "-x", "c++", "-", "-o", os.devnull]
    if subprocess.run(probe, input="int main() {}", capture_output=True, text=True).returncode:
        pytest.skip(f"{COMPILER} has no -fsanitize=address,undefined")
    return COMPILER


@pytest.fixture(scope="session")
def sanitized_library(compiler):
    """Build csrc/ with AddressSanitizer and UBSan in build/, so that the next run rebuilds little.

    With -Og it compiles fast and still runs fast.
    """
    cmake = shutil.which("cmake", path=os.path.dirname(sys.executable)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    folder = ROOT / "build" / "sanitized"
    options = ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-Og", "-DCONTEXTRAST_SANITIZE=address,undefined"]
    for command in ([cmake, "-S", ROOT, "-B", folder, *options], [cmake, "--build", folder, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "_native.so"


def run_sanitized(compiler, library, program, *arguments):
    """Python with the sanitizer's run time loaded first, and the sanitized library in place of the package's."""

    def runtime(name):
        command = [compiler, f"-print-file-name={name}"]
        path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(path):
            pytest.skip(f"{compiler} does not say where its {name} is, which must be loaded before Python")
        return path

    prologue = (
        f"import pathlib; from contextrast_kernels import native; native._PATH = pathlib.Path({str(library)!r})\n"
    )
    environment = os.environ | {
        # AddressSanitizer looks up the exceptions of the C++ library when it starts, and torch throws some.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch have many leaks
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", prologue + program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


RUN_TESTS = "import sys, pytest; sys.exit(pytest.main(['-s', '-p', 'no:cacheprovider', *sys.argv[1:]]))"


@pytest.mark.long
def test_sanitizers_see_an_overrun(compiler, sanitized_library):
    """They detect an output that is one row too short, and a scratch that is 16 bytes too short."""
    calls = """
import ctypes, os, torch
classes = torch.zeros(1, 40, 70, dtype=torch.int64)
classes[0, 5, 5] = -1
library = native._library()
wanted = native._Distance(None, True, torch.empty(1, 40, 70, dtype=torch.int32), None)
size = library.contextrast_distance_scratch_cpu(native._Volume(classes), wanted, 1, 1)
text = ctypes.create_string_buffer(256)
for rows, scratch_bytes in ((40, size), (39, size), (40, size - 16)):
    child = os.fork()
    if child == 0:
        out, scratch = torch.empty(rows, 70, dtype=torch.int32), torch.empty(scratch_bytes, dtype=torch.uint8)
        wanted.distance = out.data_ptr()
        library.contextrast_edge_distance_cpu(native._Volume(classes), wanted, scratch.data_ptr(), 1, text)
        os._exit(0)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = run_sanitized(compiler, sanitized_library, calls)
    assert done.stdout.split() == ["ended", "0", "ended", "1", "ended", "1"], done.stdout + done.stderr[-3000:]
    assert done.stderr.count("ERROR: AddressSanitizer") == 2


@pytest.mark.long
def test_fuzzed_calls_are_clean_under_sanitizers(compiler, sanitized_library):
    """The examples are always the same, so that a failure can be repeated. The slow test below draws new ones and runs
    all tests of the library."""
    chosen = "fuzzed_calls or fuzzed_volumes or empty_input or extreme or longest"
    tests = ["tests/csrc/test_native.py", "tests/distance", "-k", chosen]
    done = run_sanitized(compiler, sanitized_library, RUN_TESTS, *tests, "--hypothesis-seed=0")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:3000]  # a finding begins with its line of code


@pytest.mark.slow
def test_all_calls_are_clean_under_sanitizers(compiler, sanitized_library):
    tests = ["tests/csrc/test_native.py", "tests/loss/test_bane.py", "tests/distance"]
    done = run_sanitized(compiler, sanitized_library, RUN_TESTS, *tests, "-k", "not [reference and not real")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:3000]
