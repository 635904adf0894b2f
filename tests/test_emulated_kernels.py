"""The CUDA kernels of csrc/, run on a CPU by the machine of tests/emulation, equal the library's CPU code bit for bit.

Every launch runs as written: descriptors, grids, shared memory, warps, tickets. Blocks and threads take turns in an
order drawn by a seed. What this cannot show is in tests/test_native_gpu.py.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import native_cases as cases
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contextrast_kernels import native
from contextrast_kernels.cases import CASES

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests/emulation"
SOURCES = (ROOT / "csrc/edt.cu", ROOT / "csrc/select.cu", EMULATION / "machine.cpp")
FLAGS = (
    *("-std=c++17", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-I", str(EMULATION), "-I", str(ROOT / "csrc"), "-x", "c++"),
)

pytestmark = pytest.mark.skipif(native.status("cpu") != "ok", reason=f"native library: {native.status('cpu')}")


def build(folder, *sources, flags=("-O2",)):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the kernels are emulated with g++, which was not found")
    library = folder / "emulated.so"
    command = [compiler, *FLAGS, *flags, *map(str, sources), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


class Machine:
    """The kernels in the place of the CPU code: native's ops on CPU tensors run them inside ``with machine.on():``."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        for name, arguments in native._ARGUMENTS.items():
            function = getattr(self.library, f"contextrast_{name}_cuda")
            function.argtypes = (*arguments, ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
        for name, arguments in native._SCRATCH_ARGUMENTS.items():
            function = getattr(self.library, f"contextrast_{name}_scratch_cuda")
            function.argtypes, function.restype = arguments, ctypes.c_int64
        self.library.emulation_seed.argtypes = (ctypes.c_uint64,)
        self.library.emulation_launches.restype = ctypes.c_longlong
        self.device = 0

    def _function(self, name, device):
        function = getattr(self.library, f"contextrast_{name}_cuda")
        if name.endswith("_scratch"):
            return lambda *arguments: function(*arguments[:-1])
        return lambda *arguments: function(*arguments[:-2], self.device, None, arguments[-1])

    @contextlib.contextmanager
    def on(self, seed=0):
        cpu_function, native._function = native._function, self._function
        self.library.emulation_seed(seed)
        # torch.empty then gives NaN and the largest integers: what a kernel does not write shows
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            native._function = cpu_function

    def launches(self, op, arguments):
        before = self.library.emulation_launches()
        with self.on():
            getattr(native, op)(*arguments)
        return self.library.emulation_launches() - before


@pytest.fixture(scope="session")
def machine(tmp_path_factory):
    return Machine(build(tmp_path_factory.mktemp("emulation"), *SOURCES))


def assert_same(machine, case, seed=0):
    name, op, arguments = case
    expected = cases.call(op, arguments)
    with machine.on(seed):
        actual = cases.call(op, arguments)
    assert len(actual) == len(expected), name
    for i, (got, want) in enumerate(zip(actual, expected)):
        assert got.dtype == want.dtype and torch.equal(got, want), (
            f"{name}: result {i} differs at {(got != want).nonzero()}"
        )


SIZES = [(1, 1), (1, 70), (70, 1), (2, 3), (31, 33), (32, 64), (33, 31), (64, 65), (65, 127)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_distances_of_adversarial_maps(machine, rng, size):
    for case in cases.distances([size], rng):
        assert_same(machine, case)


@pytest.mark.parametrize("what", ["distances_of_types", "errors", "selections", "negatives", "long_segments"])
def test_the_kernels_equal_the_cpu(machine, rng, what):
    for case in getattr(cases, what)(rng):
        assert_same(machine, case)


@pytest.mark.parametrize("width", [128, 129, 1023, 1025, 4100])
def test_rows_longer_than_a_window(machine, width):
    """Few seeds, far apart: whole rows are left to the anchors."""
    classes = torch.zeros(1, 35, width, dtype=torch.int64)
    classes[0, 3, 5] = classes[0, 33, width // 2] = -1
    classes[0, 34, width - 1] = 1
    assert_same(machine, (f"two far holes, {width}", "edge_distance", (classes, True)))
    assert_same(machine, (f"whole image, {width}", "edge_distance", (torch.zeros_like(classes), False)))


def test_the_longest_row_fits(machine):
    classes = torch.zeros(1, 2, 16384, dtype=torch.int64)
    classes[0, 1, 9000] = -1
    assert_same(machine, ("16384 wide", "edge_distance", (classes, True)))
    assert_same(machine, ("16384 high", "edge_distance", (classes.mT, True)))


@pytest.mark.parametrize("at", ["layer", "full"])
def test_a_batch_of_real_size(machine, rng, at):
    case = replace(CASES["camvid"], batch=2)
    labels, predictions = case.label_maps()
    logits = cases.logits_of(predictions[:, ::4, ::4], 11, rng).bfloat16()
    sizes = [side for size in case.sizes for side in size]
    assert_same(machine, (at, "bane_negatives", (logits, labels, 11, sizes, 0.5, "bane", at, 255, cases.seed(8))))


@pytest.mark.parametrize("seed", range(1, 9))
def test_no_order_of_threads_and_blocks_changes_a_result(machine, rng, seed):
    everything = [*cases.selections(rng), *cases.negatives(rng), *cases.distances([(70, 40)], rng)]
    for i in rng.choice(len(everything), 12, replace=False):
        assert_same(machine, everything[i], seed)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_call_equals_the_cpu(machine, data):
    B, H, W = (data.draw(st.integers(1, most), name) for name, most in (("B", 3), ("H", 40), ("W", 80)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "values"))
    lowest, highest = data.draw(st.sampled_from([(-1, 1), (-1, 2), (-3, 40), (0, 3), (-(2**62), 2**62)]), "range")
    maps = [torch.from_numpy(rng.integers(lowest, highest, (B, H, W))) for _ in range(2)]
    labels, predictions = (cases.stridden(x) if data.draw(st.booleans(), "strides") else x for x in maps)
    num_classes, ratio = data.draw(st.sampled_from([-1, 1, 3, 2000]), "N"), data.draw(st.floats(0, 1), "ratio")
    seed = torch.tensor([data.draw(st.integers(-(2**63), 2**63 - 1), "seed")])
    sizes = data.draw(st.lists(st.integers(1, 30), max_size=8).filter(lambda x: len(x) % 2 == 0), "sizes")
    which = data.draw(st.sampled_from(["bane", "semi-hard"])), data.draw(st.sampled_from(["layer", "full"]))
    order = data.draw(st.integers(0, 2**32), "order")
    distance = native.edge_distance(labels, True)
    for op, arguments in (
        ("edge_distance", (labels, True)),
        ("distance_transform", (predictions, False)),
        ("error_map", (predictions, labels, num_classes, 0)),
        ("select_nearest", (predictions, distance, ratio, num_classes, seed)),
        ("bane_negatives", (predictions, labels, num_classes, sizes, ratio, *which, 0, seed)),
    ):
        assert_same(machine, (op, op, arguments), order)


def test_exhaustive_small_maps(machine):
    """All maps of three values, as one batch each: every neighbourhood, every pair of seeds."""
    for H, W in ((1, 7), (7, 1), (2, 3)):
        digits = np.arange(3 ** (H * W))[:, None] // 3 ** np.arange(H * W) % 3
        classes = torch.from_numpy(digits.reshape(-1, H, W) - 1)
        assert_same(machine, (f"all {H}x{W}", "edge_distance", (classes, True)))


def test_layers_in_one_call_equal_calls_for_each(machine, rng):
    for _, op, arguments in cases.negatives(rng):
        predictions, labels, num_classes, sizes, *rest = arguments
        if len(sizes) < 2:
            continue
        with machine.on():
            *together, errors = cases.call(op, arguments)
            for i, layer in enumerate(together):
                one_size = sizes[2 * i : 2 * i + 2]
                alone, its_errors = cases.call(op, (predictions, labels, num_classes, one_size, *rest))
                assert torch.equal(layer, alone) and errors[i] == its_errors[0]
        break


def test_the_number_of_launches_does_not_grow_with_layers(machine, rng):
    labels = torch.zeros(2, 64, 64, dtype=torch.int64)
    assert machine.launches("edge_distance", (labels, True)) == 2
    assert machine.launches("error_map", (labels, labels, 3, 255)) == 1
    assert machine.launches("select_nearest", (labels, labels.int(), 0.5, 3, cases.seed())) == 3
    for sizes in ([64, 64], [64, 64, 32, 32, 16, 16, 8, 8]):
        for which, at, expected in (
            ("bane", "layer", 5), ("semi-hard", "layer", 3), ("bane", "full", 6), ("semi-hard", "full", 4),
        ):  # fmt: skip
            arguments = (labels, labels, 3, sizes, 0.5, which, at, 255, cases.seed())
            for op in "bane_negatives", "bane_codes":
                assert machine.launches(op, arguments) == expected
    memsets, kernels = (sum((name == "memset") == is_memset for name in native.BANE_ENQUEUES) for is_memset in (1, 0))
    assert (memsets, kernels) == (1, 5)


def test_refusals_are_those_of_the_cpu(machine):
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    for op, arguments in (
        ("edge_distance", (labels.float(), True)),
        ("edge_distance", (labels[:, :1, :1].expand(1, 16385, 1), True)),
        ("select_nearest", (labels[:, :1, :1].expand(1, 1, 20000), labels.int(), 0.5, -1, cases.seed())),
        ("error_map", (labels.expand(2, 4, 4), labels, 3, 255)),
        ("error_map", (labels[:, :0], labels, 3, 255)),
        ("select_nearest", (labels, labels, 0.5, 3, cases.seed())),
        ("select_nearest", (labels, labels.int()[:, 1:], 0.5, 3, cases.seed())),
        ("bane_negatives", (labels, labels, -1, [1, 20000], 0.5, "bane", "layer", 255, cases.seed())),
        ("bane_negatives", (labels[:, :0], labels[:, :0], 3, [2, 2], 0.5, "bane", "layer", 255, cases.seed())),
    ):
        with pytest.raises(ValueError) as on_cpu:
            getattr(native, op)(*arguments)
        with pytest.raises(ValueError) as emulated, machine.on():
            getattr(native, op)(*arguments)
        assert str(emulated.value) == str(on_cpu.value)


def test_too_many_layers_are_refused(machine):
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="at most 16 layers are supported, got 17"), machine.on():
        native.bane_negatives(labels, labels, 3, [1, 1] * 17, 0.5, "bane", "layer", 255, cases.seed())


def test_what_cuda_says_is_reported(machine):
    machine.device = 1
    try:
        with pytest.raises(RuntimeError, match="CUDA: invalid device ordinal"), machine.on():
            native.edge_distance(torch.zeros(1, 4, 4, dtype=torch.int64), True)
    finally:
        machine.device = 0


def test_the_machine_finds_what_a_gpu_would_not_forgive(tmp_path):
    library = ctypes.CDLL(str(build(tmp_path, EMULATION / "faults.cu", EMULATION / "machine.cpp")))
    library.fault.restype = ctypes.c_char_p
    for which, sentence in enumerate((
        "no error",
        "emulation: lanes of a warp meet in __shfl_sync and __ballot_sync",
        "emulation: threads wait for one that has returned or waits elsewhere",
        "emulation: threads wait for one that has returned or waits elsewhere",
        "invalid argument",
        "invalid configuration argument",
    )):  # fmt: skip
        assert library.fault(which).decode() == sentence
    # a barrier that is missing: some order of threads shows it, one with the barrier never does
    assert library.wrong_sums(1) == 0
    assert library.wrong_sums(0) > 0


SANITIZED = """
import sys
import numpy as np
sys.path[:0] = {paths!r}
import native_cases as cases, test_emulated_kernels as emulated
machine = emulated.Machine({library!r})
rng = np.random.default_rng(5)
checked = [
    *[*cases.distances([(1, 40), (40, 1), (33, 64)], rng), *cases.distances_of_types(rng)][::2],
    *[*cases.errors(rng), *cases.selections(rng)][::5],
    *[*cases.long_segments(rng)][::6],
    *[*cases.negatives(rng)][::9],
]
for seed, case in enumerate(checked):
    emulated.assert_same(machine, case, seed)
print("checked", len(checked))
"""


def run_sanitized(folder, *sources):
    """AddressSanitizer knows the exact ends of inputs, outputs, shared memory and every piece of scratch."""
    library = build(folder, *sources, flags=("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"))
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    program = SANITIZED.format(paths=[str(ROOT), str(ROOT / "tests")], library=str(library))
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_the_kernels_keep_inside_their_memory(tmp_path):
    done = run_sanitized(tmp_path, *SOURCES)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("checked")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "line", "instead"),
    [
        ("edt.cu", "static_cast<size_t>(warps * row_bytes)", "static_cast<size_t>(warps * row_bytes - 4)"),
        ("edt.cu", "const int64_t count = batch * bands_of(height) * width;", "const int64_t count = batch * width;"),
        ("select.cu", "if (pixel >= layer.num_pixels()) continue;", ""),
    ],
)
def test_a_step_outside_is_seen(tmp_path, source, line, instead):
    text = (ROOT / "csrc" / source).read_text()
    assert line in text
    (tmp_path / source).write_text(text.replace(line, instead))
    others = [path for path in SOURCES if path.name != source]
    done = run_sanitized(tmp_path, tmp_path / source, *others)
    assert done.returncode != 0 and "ERROR: AddressSanitizer" in done.stderr
