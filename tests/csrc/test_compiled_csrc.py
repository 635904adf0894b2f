"""The CUDA code of csrc/, executed on a CPU, equals the library's CPU code bit for bit and has no fault.

nvcc compiles it. tests/compiled/runtime.cpp replaces CUDA's runtime for the host code, and the machine of
tests/compiled executes the PTX of the kernels. Every call runs twice, with blocks and warps in two random orders.
tests/compiled/README.md says what is checked. tests/csrc/test_native_gpu.py tests what this cannot show.
"""

import re
from dataclasses import replace
from pathlib import Path

import native_cases as cases
import numpy as np
import pytest
import torch
from compiled import csrc
from compiled.checks import faults
from compiled.engine import Schedule
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import contextrast_kernels as ck
from contextrast_kernels import native
from contextrast_kernels.cases import CASES

pytestmark = [
    pytest.mark.skipif(native.status("cpu") != "ok", reason=f"native library: {native.status('cpu')}"),
    pytest.mark.skipif(bool(csrc.missing()), reason=csrc.missing() or "nvcc is here"),
]

SCHEDULES = Schedule(seed=1), Schedule(seed=2, quantum=60)
SLOW = pytest.mark.slow


@pytest.fixture(scope="session")
def devices():
    made = {}

    def device(arch):
        if arch not in made:
            made[arch] = csrc.Native(csrc.build(arch))
        return made[arch]

    return device


@pytest.fixture
def gpu(devices):
    device = devices(90)
    device.findings.clear()
    return device


def tensors_of(arguments):
    return [argument for argument in arguments if isinstance(argument, torch.Tensor)]


def same(a, b):
    return torch.equal(
        a.nan_to_num(7.0) if a.is_floating_point() else a, b.nan_to_num(7.0) if b.is_floating_point() else b
    )


def assert_same(gpu, case, schedules=SCHEDULES):
    name, op, arguments = case
    expected, before = cases.call(op, arguments), [tensor.clone() for tensor in tensors_of(arguments)]
    for schedule in schedules:
        with gpu.on(tensors_of(arguments), schedule):
            actual = cases.call(op, arguments)
        assert not faults(gpu.findings), "\n".join([name, *map(str, faults(gpu.findings))])
        assert not gpu.unwritten(actual), f"{name}: {gpu.unwritten(actual)} has bytes that no kernel wrote"
        assert all(map(same, tensors_of(arguments), before)), f"{name}: an input has changed"
        for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
            assert got.dtype == want.dtype and torch.equal(got, want), (
                f"{name}: result {i} differs at {(got != want).nonzero()}"
            )


# --------------------------------------------------------------------------------------------------- equal to the CPU

SIZES = [(1, 1), (1, 70), (70, 1), (2, 3), (31, 33), (32, 64), (33, 31), (64, 65), (65, 127)]


def every(what, rng):
    return list(getattr(cases, what)(rng))


@pytest.mark.parametrize(
    ("what", "step"),
    [
        *(("distances_of_types", 6), ("errors", 13), ("selections", 6), ("negatives", 45)),
        *(("volumes_of_types", 6), ("volumes", 73)),
    ],
)
def test_the_kernels_equal_the_cpu(gpu, rng, what, step):
    for case in every(what, rng)[1::step]:
        assert_same(gpu, case)


def test_distances_of_adversarial_maps_equal_the_cpu(gpu, rng):
    for case in list(cases.distances([(1, 40), (33, 64)], rng))[::23]:
        assert_same(gpu, case)


@SLOW
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_distances_of_adversarial_maps_equal_the_cpu(devices, rng, size, arch):
    for case in cases.distances([size], rng):
        assert_same(devices(arch), case)


@SLOW
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    "what",
    [
        *("distances_of_types", "errors", "selections", "negatives", "long_segments"),
        *("volumes_of_types", "volumes"),
    ],
)
def test_all_kernels_equal_the_cpu(devices, rng, what, arch):
    for number, case in enumerate(every(what, rng)):
        assert_same(devices(arch), case, SCHEDULES if number % 4 == 0 else SCHEDULES[number % 2 :][:1])


def far_holes(width):
    """Few sites that are far apart, so that whole rows are left to the pivots."""
    classes = torch.zeros(1, 35, width, dtype=torch.int64)
    classes[0, 3, 5] = classes[0, 33, width // 2] = -1
    classes[0, 34, width - 1] = 1
    return classes


@pytest.mark.parametrize("width", [129, *(pytest.param(w, marks=SLOW) for w in (128, 1023, 1025, 4100))])
def test_rows_longer_than_a_window_equal_the_cpu(gpu, width):
    assert_same(gpu, (f"two far holes, {width}", "edge_distance", (far_holes(width), True)))
    whole = torch.zeros(1, 3, width, dtype=torch.int64)
    assert_same(gpu, (f"whole image, {width}", "edge_distance", (whole, False)))


@SLOW
def test_the_longest_rows_equal_the_cpu(gpu):
    classes = torch.zeros(1, 2, 16384, dtype=torch.int64)
    classes[0, 1, 9000] = -1
    assert_same(gpu, ("16384 wide", "edge_distance", (classes, True)))
    assert_same(gpu, ("16384 high", "edge_distance", (classes.mT, True)))


@SLOW
@pytest.mark.parametrize("sampling", [None, (0.3, 0.7, 1.1)])
def test_the_longest_lines_of_volumes_equal_the_cpu(gpu, sampling):
    for shape in ((1, 2, 16384, 2), (1, 2, 2, 16384), (1, 16384, 2, 2)):
        mask = torch.ones(shape)
        mask.view(-1)[[5, 9000]] = 0
        assert_same(gpu, (str(shape), "nearest_zero", (mask, True, sampling)), SCHEDULES[1:])


def test_work_per_line_is_linear_in_its_length(gpu):
    """The worst lines have sites only at their ends, which no window reaches."""

    def of_a_pixel(op, sampling, width):
        mask = torch.ones(1, 1, width, dtype=torch.int32)
        mask[..., 0] = mask[..., -1] = 0
        gpu.launches.clear()
        with gpu.on([mask]):
            getattr(native, op)(mask, True, *sampling)
        return gpu.launches[-1].instructions / width

    for sampling in ((), ((1.0, 0.3),)):
        short, long = (of_a_pixel("distance_transform", sampling, width) for width in (512, 4096))
        assert (
            long < 1.6 * short
        )  # the bisection has three more steps; a search of every pixel would cost 8 times as much


@SLOW
@pytest.mark.parametrize("at", ["layer", "full"])
def test_a_batch_of_real_size_equals_the_cpu(gpu, rng, at):
    case = replace(CASES["camvid"], batch=2)
    labels, predictions = case.label_maps()
    logits = cases.logits_of(predictions[:, ::4, ::4], 11, rng).bfloat16()
    sizes = [side for size in case.sizes for side in size]
    call = (logits, labels, 11, sizes, 0.5, "bane", at, 255, cases.seed(8))
    assert_same(gpu, (at, "bane_negatives", call), SCHEDULES[1:])


@SLOW
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_call_equals_the_cpu(gpu, data):
    B, H, W = (data.draw(st.integers(1, most), name) for name, most in (("B", 3), ("H", 40), ("W", 80)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "values"))
    lowest, highest = data.draw(st.sampled_from([(-1, 1), (-1, 2), (-3, 40), (0, 3), (-(2**62), 2**62)]), "range")
    maps = [torch.from_numpy(rng.integers(lowest, highest, (B, H, W))) for _ in range(2)]
    labels, predictions = (cases.stridden(x) if data.draw(st.booleans(), "strides") else x for x in maps)
    num_classes, ratio = data.draw(st.sampled_from([1, 3, 2000]), "N"), data.draw(st.floats(0, 1), "ratio")
    seed = torch.tensor([data.draw(st.integers(-(2**63), 2**63 - 1), "seed")])
    sizes = data.draw(st.lists(st.integers(1, 30), max_size=8).filter(lambda x: len(x) % 2 == 0), "sizes")
    which = data.draw(st.sampled_from(["bane", "semi-hard"])), data.draw(st.sampled_from(["layer", "full"]))
    order = Schedule(data.draw(st.integers(1, 2**32), "order"), data.draw(st.sampled_from([0, 20, 300]), "quantum"))
    distance = native.edge_distance(labels, True)
    for op, arguments in (
        ("edge_distance", (labels, True)),
        ("distance_transform", (predictions, False)),
        ("error_map", (predictions, labels, num_classes, 0)),
        ("select_nearest", (predictions, distance, ratio, num_classes, seed)),
        ("bane_negatives", (predictions, labels, num_classes, sizes, ratio, *which, 0, seed)),
    ):
        assert_same(gpu, (op, op, arguments), (order,))


def test_every_small_map_equals_the_cpu(gpu):
    """All maps of three values form one batch, which has every neighbourhood and every pair of sites."""
    for H, W in ((1, 4), (4, 1), (2, 2)):
        digits = np.arange(3 ** (H * W))[:, None] // 3 ** np.arange(H * W) % 3
        classes = torch.from_numpy(digits.reshape(-1, H, W) - 1)
        assert_same(gpu, (f"all {H}x{W}", "edge_distance", (classes, True)), SCHEDULES[:1])


@SLOW
def test_every_larger_map_equals_the_cpu(gpu):
    for H, W in ((1, 7), (7, 1), (2, 3)):
        digits = np.arange(3 ** (H * W))[:, None] // 3 ** np.arange(H * W) % 3
        classes = torch.from_numpy(digits.reshape(-1, H, W) - 1)
        assert_same(gpu, (f"all {H}x{W}", "edge_distance", (classes, True)), SCHEDULES[1:])


def test_selections_of_volumes_equal_the_cpu(gpu, rng):
    errors = torch.from_numpy(rng.integers(-1, 3, (2, 5, 9, 35))).int()
    distance = native.edge_distance(errors, True)
    arguments = {"ratio": 0.3, "num_classes": 3, "seed": cases.seed(7)}
    expected = ck.select_nearest(errors, distance, **arguments)
    assert expected.any(0).sum() > 100
    gpu.launches.clear()
    for schedule in SCHEDULES:
        with gpu.on([errors, distance, arguments["seed"]], schedule):
            assert torch.equal(ck.select_nearest(errors, distance, **arguments), expected)
        assert not faults(gpu.findings)
    assert len(gpu.launches) == 2 * 3


def test_layers_in_one_call_equal_calls_for_each(gpu, rng):
    labels = torch.from_numpy(rng.integers(0, 3, (2, 20, 30)))
    predictions, sizes, rest = labels.roll(1, -1), [20, 30, 9, 11, 1, 1], (0.4, "bane", "layer", 255, cases.seed(3))
    with gpu.on([labels, predictions]):
        *together, errors = cases.call("bane_negatives", (predictions, labels, 3, sizes, *rest))
    for i, layer in enumerate(together):
        with gpu.on([labels, predictions]):
            alone, own = cases.call("bane_negatives", (predictions, labels, 3, sizes[2 * i : 2 * i + 2], *rest))
        assert torch.equal(layer, alone) and errors[i] == own[0]


# ------------------------------------------------------------------------------------------------------ the host's part


def launches(gpu, op, arguments):
    gpu.launches.clear()
    with gpu.on(tensors_of(arguments)):
        getattr(native, op)(*arguments)
    return len(gpu.launches)


def test_the_number_of_launches_does_not_grow_with_layers(gpu):
    labels = torch.zeros(1, 16, 16, dtype=torch.int64)
    assert launches(gpu, "edge_distance", (labels, True)) == 2
    assert launches(gpu, "error_map", (labels, labels, 3, 255)) == 1
    assert launches(gpu, "select_nearest", (labels, labels.int(), 0.5, 3, cases.seed())) == 3
    for sizes in ([16, 16], [16, 16, 8, 8, 4, 4, 2, 2]):
        for which, at, expected in (
            ("bane", "layer", 5), ("semi-hard", "layer", 3), ("bane", "full", 6), ("semi-hard", "full", 4),
        ):  # fmt: skip
            arguments = (labels, labels, 3, sizes, 0.5, which, at, 255, cases.seed())
            for op in "bane_negatives", "bane_codes":
                assert launches(gpu, op, arguments) == expected
    memsets, kernels = (sum((name == "memset") == is_memset for name in native.BANE_ENQUEUES) for is_memset in (1, 0))
    assert (memsets, kernels) == (1, 5)


def test_errors_are_those_of_the_cpu(gpu):
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    for op, arguments in (
        ("edge_distance", (labels[:, :1, :1].expand(1, 16385, 1), True)),
        ("select_nearest", (labels[:, :1, :1].expand(1, 1, 20000), labels.int(), 0.5, 3, cases.seed())),
        ("select_nearest", (labels, labels.int(), 0.5, -1, cases.seed())),
        ("select_nearest", (labels, labels.int(), 0.5, 2**20 + 1, cases.seed())),
        ("error_map", (labels.expand(2, 4, 4), labels, 3, 255)),
        ("error_map", (labels[:, :0], labels, 3, 255)),
        ("select_nearest", (labels, labels, 0.5, 3, cases.seed())),
        ("select_nearest", (labels, labels.int()[:, 1:], 0.5, 3, cases.seed())),
        ("bane_negatives", (labels, labels, 2**20 + 1, [4, 4], 0.5, "bane", "layer", 255, cases.seed())),
        ("bane_negatives", (labels, labels, 3, [1, 20000], 0.5, "bane", "layer", 255, cases.seed())),
        ("bane_negatives", (labels[:, :0], labels[:, :0], 3, [2, 2], 0.5, "bane", "layer", 255, cases.seed())),
    ):
        with pytest.raises(ValueError) as on_cpu:
            getattr(native, op)(*arguments)
        with pytest.raises(ValueError) as on_gpu, gpu.on(tensors_of(arguments)):
            getattr(native, op)(*arguments)
        assert str(on_gpu.value) == str(on_cpu.value)


def test_too_many_layers_are_refused(gpu):
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="layers: expected at most 16, got 17"), gpu.on([labels]):
        native.bane_negatives(labels, labels, 3, [1, 1] * 17, 0.5, "bane", "layer", 255, cases.seed())


def test_cuda_errors_are_reported(gpu):
    gpu.index = 1
    try:
        labels = torch.zeros(1, 4, 4, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="CUDA: invalid device ordinal"), gpu.on([labels]):
            native.edge_distance(labels, True)
    finally:
        gpu.index = 0


# ------------------------------------------------------------------------------------------------------ planted faults

FAULTS = Path(csrc.__file__).with_name("faults.cu")
FOUND = [
    *("nothing", "not all lanes take part", "undefined value stored", "warps wait at different barriers"),
    *("not all lanes take part", "race in shared memory", "without a warp barrier"),
    *("outside of shared memory", "outside of shared memory", "undefined value stored"),
    *("outside of every tensor", "undefined branch or guard", "undefined address", "undefined value in an atomic"),
    *("not aligned", "lanes of one store bring different values"),
    *("cache for read-only data", "integer division by zero", "too many instructions"),
    *("race in global memory between blocks",) * 5,
    *("outside of every tensor", "invalid argument"),
]
"""What the machine reports for each fault of faults.cu, in order."""


def test_the_machine_finds_each_planted_fault():
    gpu = csrc.Device(csrc.build(90, [FAULTS]))
    gpu.limit = 100_000
    gpu.library.fault.argtypes = (csrc.ctypes.c_int, *(csrc.ctypes.c_void_p,) * 3)
    gpu.library.fault.restype = csrc.ctypes.c_char_p
    for which, expected in enumerate(FOUND):
        said = set()
        for seed in 1, 2:
            given, result, scratch = torch.arange(64).int(), torch.empty(64).int(), torch.empty(1024).byte()
            memory = csrc.inputs([given]) + [csrc.Memory(t, "new", True) for t in (result, scratch)]
            gpu.holds(memory, Schedule(seed, quantum=10 * seed))
            gpu.findings.clear()
            said.add(gpu.library.fault(which, *(t.data_ptr() for t in (given, result, scratch))).decode())
            said.update(fault.kind for fault in faults(gpu.findings))
            assert gpu.error is None
        if expected == "nothing":
            assert said == {"no error"}
        else:
            assert any(expected in sentence for sentence in said), f"fault {which}: {expected!r}, got {said}"


def deletions(gpu):
    """(kernel, number of a line) of every barrier of a block and every fence in the kernels."""
    for text in gpu.built.ptx.values():
        kernel = ""
        for number, line in enumerate(text.split("\n"), 1):
            kernel = found[1] if (found := re.match(r"\.entry (\w+)", line)) else kernel
            if re.match(r"(membar\.gl|bar\.sync)", line.strip()):
                yield kernel, number


def sees(gpu, case, kernel, number, schedule):
    """Whether a run without one line of a kernel differs or has a fault. None if the call does not run the kernel."""

    def mutate(name, text):
        if name != kernel:
            return text
        lines = text.split("\n")
        lines[number - 1] = ""
        return "\n".join(lines)

    _, op, arguments = case
    gpu.findings.clear(), gpu.launches.clear()
    gpu.mutate = mutate
    try:
        with gpu.on(tensors_of(arguments), schedule):
            actual = cases.call(op, arguments)
    finally:
        gpu.mutate = None
    if kernel not in {launched.kernel for launched in gpu.launches}:
        return None
    differs = any(not torch.equal(got, want) for got, want in zip(actual, cases.call(op, arguments), strict=True))
    return differs or bool(faults(gpu.findings))


def calls(rng):
    """One call or more for each kernel with barriers or fences."""
    yield "uint8", "edge_distance", (far_holes(100).to(torch.uint8), True)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        yield str(dtype), "distance_transform", (torch.from_numpy(rng.integers(0, 2, (2, 70, 40))).to(dtype), True)
    wanted = "small distances, ratio 0.3", "every distance, ratio 0.3", "far distances, ratio 0.3"
    yield from (case for case in cases.long_segments(rng, 60, 100) if case[0] in wanted)
    # So many classes that several warps lay out their segments.
    labels, many = torch.from_numpy(rng.integers(0, 80, (2, 20, 70))), 80
    squared = torch.from_numpy(rng.integers(0, 9, (2, 20, 70))).int()
    yield "many classes", "select_nearest", (labels, squared, 0.4, many, cases.seed())
    predictions, rest = labels.roll(1, -1), (labels, many, [20, 70], 0.4, "bane", "layer", 255, cases.seed())
    for maps in (predictions, *(cases.logits_of(predictions, many, rng).to(dtype) for dtype in cases.FLOATS[1:])):
        yield str(maps.dtype), "bane_negatives", (maps, *rest)


@SLOW
def test_a_missing_barrier_or_fence_is_detected(gpu, rng):
    """Each is deleted alone from the compiled kernels. One order of warps may hide the deletion, but not both."""
    given, unseen = list(calls(rng)), []
    for kernel, number in deletions(gpu):
        if not any(sees(gpu, case, kernel, number, order) for case in given for order in SCHEDULES[::-1]):
            unseen.append((kernel, number))
    assert len(list(deletions(gpu))) > 40 and not unseen, unseen


@SLOW
@pytest.mark.parametrize(
    ("source", "line", "instead", "found"),
    [
        ("edt.cu", "static_cast<size_t>(warps * row_bytes)", "static_cast<size_t>(warps * row_bytes - 4)", "shared"),
        (
            "edt.cu",
            "const int64_t count = batch * bands_of(height) * width;",
            "const int64_t count = width;",
            "outside",
        ),
        ("select.cu", "if (pixel >= layer.num_pixels()) continue;", "", "outside"),
    ],
)
def test_an_access_out_of_bounds_is_detected(tmp_path, rng, source, line, instead, found):
    text = (csrc.ROOT / "csrc" / source).read_text()
    assert line in text
    (tmp_path / source).write_text(text.replace(line, instead))
    others = [path for path in sorted((csrc.ROOT / "csrc").glob("*.cu")) if path.name != source]
    broken = csrc.Native(csrc.build(90, [tmp_path / source, *others], tmp_path))
    with pytest.raises(AssertionError, match=found):
        for case in (*every("distances_of_types", rng)[:4], *every("errors", rng)[:2]):
            assert_same(broken, case)
