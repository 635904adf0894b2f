"""On a GPU the CUDA kernels equal the CPU code bit for bit, on any stream and device and in graphs, and never wait.

What they compute is tested in test_native.py and, kernel by kernel, in test_compiled_csrc.py.
"""

import functools
from dataclasses import replace

import native_cases as cases
import numpy as np
import pytest
import torch

from contextrast_kernels import native
from contextrast_kernels.cases import CASES, REGIMES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.status("cuda") != "ok", reason=f"native, cuda: {native.status('cuda')}"),
]


@pytest.fixture(autouse=True)
def poison():
    """Fill what torch.empty returns, scratch included, so that tests see what a kernel does not write."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(argument):
    """The same tensor on the GPU, with its strides and offset."""
    if not isinstance(argument, torch.Tensor):
        return argument
    storage = torch.empty(0, dtype=argument.dtype).set_(argument.untyped_storage())
    return storage.cuda().as_strided(argument.shape, argument.stride(), argument.storage_offset())


def assert_same(case):
    name, op, arguments = case
    expected = cases.call(op, arguments)
    actual = cases.call(op, [on_gpu(argument) for argument in arguments])
    for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert got.is_cuda and got.dtype == want.dtype and torch.equal(got.cpu(), want), f"{name}: layer {i}"


SIZES = [(1, 1), (1, 70), (70, 1), (2, 3), (31, 33), (32, 64), (33, 31), (64, 65), (65, 127), (129, 128), (97, 300)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_distances_of_adversarial_maps_equal_the_cpu(rng, size):
    for case in cases.distances([size], rng):
        assert_same(case)


@pytest.mark.parametrize(
    "what",
    [
        *("distances_of_types", "errors", "selections", "negatives", "long_segments"),
        *("volumes_of_types", "volumes"),
    ],
)
def test_the_gpu_equals_the_cpu(rng, what):
    for case in getattr(cases, what)(rng):
        assert_same(case)


@pytest.mark.parametrize(
    "size", [(1023, 1025), (1025, 1024), (2050, 2050), (70, 4100), (4100, 70), (33, 16384), (16384, 33)]
)
def test_large_maps_equal_the_cpu(rng, size):
    for values in (
        rng.integers(-1, 2, size),
        np.where(rng.random(size) < 0.001, -1, 0),
        np.where(np.add.outer(np.arange(size[0]), np.arange(size[1])) == 40, -1, 3),
        np.zeros(size, dtype=np.int64),
    ):
        classes = torch.from_numpy(values)[None]
        assert_same((f"distances {size}", "edge_distance", (classes, True)))
        distance = native.edge_distance(classes, True)
        assert_same((f"selection {size}", "select_nearest", (classes, distance, 0.37, 4, cases.seed(6))))


@pytest.mark.parametrize("sampling", [None, (2.5, 1.0, 1.0), (0.3, 0.7, 1.1), (25.0, 201.0, 1.0)], ids=str)
@pytest.mark.parametrize("size", [(128, 128, 128), (33, 257, 130), (2, 70, 4100), (16384, 3, 2)], ids=str)
def test_large_volumes_equal_the_cpu(rng, size, sampling):
    for share in (0.0, 0.001, 0.5):
        mask = rng.random((2, *size)) >= share
        mask[:, size[0] // 3, 0, size[2] // 2] = False
        classes = torch.from_numpy(np.where(mask, 1, rng.integers(-1, 3, mask.shape)))
        mask = torch.from_numpy(mask)
        for squared in True, False:
            assert_same((f"zeros {size}, {share}", "nearest_zero", (mask, squared, sampling)))
            assert_same((f"edges {size}, {share}", "edge_distance", (classes, squared, sampling)))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", CASES)
def test_the_papers_settings_equal_the_cpu(name, regime):
    case = replace(CASES[name], regime=regime)
    labels, predictions = case.label_maps()
    N, sizes = case.num_classes, [side for size in case.sizes for side in size]
    classes = native.error_map(predictions, labels, N, 255)
    assert_same(("distances", "edge_distance", (classes, True)))
    assert_same(
        ("negatives", "bane_negatives", (predictions, labels, N, sizes, 0.5, "bane", "layer", 255, cases.seed(4)))
    )


def test_an_image_beyond_32_bit_offsets_equals_the_image_alone():
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB of device memory")
    classes = torch.zeros(9, 16384, 16384, dtype=torch.uint8, device="cuda")
    classes[8, 100, 100] = 1
    assert torch.equal(native.edge_distance(classes, True)[8:], native.edge_distance(classes[8:], True))


def on_the_gpu(rng, op):
    """Arguments of a call at a real size."""
    labels, predictions = (x.cuda() for x in replace(CASES["cityscapes"], batch=4).label_maps())
    if op == "error_map":
        return predictions, labels, 19, 255
    if op == "nearest_zero":
        return torch.from_numpy(rng.random((2, 64, 200, 300)) < 0.99).cuda(), True, (2.5, 1.0, 0.7)
    if op == "bane_negatives":
        sizes = [side for size in CASES["cityscapes"].sizes for side in size]
        return predictions, labels, 19, sizes, 0.5, "bane", "layer", 255, cases.seed(1).cuda()
    classes = native.error_map(predictions, labels, 19, 255)
    if op == "select_nearest":
        return classes, native.edge_distance(classes, True), 0.5, 19, cases.seed(1).cuda()
    return (classes >= 0 if op == "distance_transform" else classes), True


OPS = ["error_map", "edge_distance", "distance_transform", "nearest_zero", "select_nearest", "bane_negatives"]


@pytest.mark.parametrize("op", OPS)
def test_work_goes_to_the_current_stream(rng, op):
    arguments = on_the_gpu(rng, op)
    expected = cases.call(op, arguments)
    late = [torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # work on another stream reads zeros
        for there, here in zip(late, arguments):
            if isinstance(here, torch.Tensor):
                there.copy_(here)
        actual = cases.call(op, late)
        stream.synchronize()
    assert all(torch.equal(got, want) for got, want in zip(actual, expected))


@pytest.mark.parametrize("op", OPS)
def test_a_second_device_gives_the_same_results(rng, op):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    arguments = on_the_gpu(rng, op)
    expected = cases.call(op, arguments)
    with torch.cuda.device(0):  # stays current, also after the call
        actual = cases.call(op, [a.to("cuda:1") if isinstance(a, torch.Tensor) else a for a in arguments])
        assert torch.cuda.current_device() == 0
    assert all(got.device.index == 1 and torch.equal(got.cpu(), want.cpu()) for got, want in zip(actual, expected))


@pytest.mark.parametrize("op", OPS)
def test_no_call_synchronises_with_the_device(rng, op):
    arguments = on_the_gpu(rng, op)
    cases.call(op, arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cases.call(op, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", OPS)
def test_a_call_returns_before_the_device_has_finished(rng, op):
    arguments = on_the_gpu(rng, op)
    cases.call(op, arguments)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    done = torch.cuda.Event()
    cases.call(op, arguments)
    done.record()
    assert not done.query()  # the sleep before it takes about a second
    torch.cuda.synchronize()


@pytest.mark.parametrize("op", ["select_nearest", "bane_negatives"])
def test_a_graph_makes_new_draws_at_each_replay(rng, op):
    *arguments, seed = on_the_gpu(rng, op)
    run = functools.partial(cases.call, op)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run([*arguments, seed])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run([*arguments, seed])
        seed.add_(1)
    start, draws = seed.clone(), set()
    for replay in range(100):
        graph.replay()
        expected = run([*arguments, start + replay])
        assert all(torch.equal(got, want) for got, want in zip(captured, expected)), replay
        draws.add(
            tuple(
                int(layer.long().mul(torch.arange(layer.numel(), device="cuda").view_as(layer)).sum())
                for layer in captured
            )
        )
    assert len(draws) == 100


@pytest.mark.parametrize("op", ["error_map", "edge_distance", "distance_transform", "nearest_zero"])
def test_a_graph_reads_its_inputs_at_each_replay(rng, op):
    first, *rest = on_the_gpu(rng, op)
    cases.call(op, (first, *rest))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cases.call(op, (first, *rest))
    for _ in range(10):
        first.copy_(first.flip(1))
        graph.replay()
        assert all(torch.equal(got, want) for got, want in zip(captured, cases.call(op, (first, *rest))))


@pytest.mark.parametrize("op", OPS)
def test_repeated_runs_give_the_same_bits(rng, op):
    arguments = on_the_gpu(rng, op)
    first = cases.call(op, arguments)
    for _ in range(20):
        assert all(torch.equal(got, want) for got, want in zip(cases.call(op, arguments), first))


def test_inputs_are_not_changed(rng):
    for op in OPS:
        arguments = on_the_gpu(rng, op)
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        cases.call(op, arguments)
        assert all(torch.equal(a, b) for a, b in zip(arguments, before) if isinstance(a, torch.Tensor))


def test_nothing_is_written_beyond_the_scratch(rng):
    """The scratch of a call ends where the next tensor begins, which must not change."""
    for op in OPS:
        arguments = on_the_gpu(rng, op)
        expected = cases.call(op, arguments)
        blocks = [torch.full((2**18,), 0x5A, dtype=torch.uint8, device="cuda") for _ in range(8)]
        del blocks[::2]
        actual = cases.call(op, arguments)
        assert all(bool((block == 0x5A).all()) for block in blocks)
        assert all(torch.equal(got, want) for got, want in zip(actual, expected))
