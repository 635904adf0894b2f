"""The backend context: threads, asyncio tasks and torch.compile."""

import asyncio
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

import contextrast_kernels as ck
from contextrast_kernels.backend import _warn_once, choose, choose_kernels

MAP = torch.zeros(1, 2, 2, dtype=torch.int64)
FEATURES, LABELS = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(1, 4, 4).long()


def chosen():
    """The backend of a map's op; "triton" is one that maps do not have."""
    return choose(MAP, ("native",))


def test_each_thread_has_its_own_backend():
    """Two blocks that overlap in time, neither inside the other."""
    usual, seen, entered, left = chosen(), {}, threading.Event(), threading.Event()

    def first():
        with ck.backend("reference"):
            entered.set()
            left.wait(10)
            seen["first, after the other chose"] = chosen()

    def second():
        entered.wait(10)
        seen["second, before it chooses"] = chosen()
        with ck.backend("triton"):
            left.set()
            threads[0].join(10)
            seen["second"] = chosen()
        seen["second, afterwards"] = chosen()

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen == {
        "first, after the other chose": "reference",
        "second, before it chooses": usual,
        "second": usual,
        "second, afterwards": usual,
    }
    assert chosen() == usual


def test_each_asyncio_task_has_its_own_backend():
    async def first(entered, left):
        with ck.backend("reference"):
            entered.set()
            await left.wait()
            return chosen()

    async def second(entered, left):
        await entered.wait()
        before = chosen()
        left.set()
        return before

    async def both():
        events = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(first(*events), second(*events))

    assert asyncio.run(both()) == ["reference", chosen()]


@pytest.fixture
def compilations():
    """A compiler that counts its graphs and runs them as they are."""
    torch.compiler.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    yield count, graphs
    torch.compiler.reset()


def test_a_compiled_function_follows_the_backend_it_is_called_in(compilations):
    """The second backend is compiled; returning to the first does not recompile. This holds in another thread too."""
    count, graphs = compilations

    @torch.compile(fullgraph=True, backend=count)
    def which(x):
        return x + (1 if choose(x, ("native",)) == "reference" else 2)

    usual = 1.0 if chosen() == "reference" else 2.0
    assert which(torch.zeros(())).item() == usual
    with ck.backend("reference"):
        assert which(torch.zeros(())).item() == 1
        results = []
        thread = threading.Thread(target=lambda: results.append(which(torch.zeros(())).item()))
        thread.start()
        thread.join(60)
    assert results == [usual]
    assert which(torch.zeros(())).item() == usual
    assert len(graphs) == 2


def test_compiled_code_in_asyncio_tasks_follows_each_task(compilations):
    """Two blocks that overlap in time, neither inside the other, in tasks of one thread."""
    count, _ = compilations

    @torch.compile(fullgraph=True, backend=count)
    def which(x):
        return x + (1 if choose(x, ("native",)) == "reference" else 2)

    async def first(entered, left):
        with ck.backend("reference"):
            entered.set()
            await left.wait()
            return which(torch.zeros(())).item()

    async def second(entered, left):
        await entered.wait()
        with ck.backend("triton"):
            left.set()
            await asyncio.sleep(0)
            return which(torch.zeros(())).item()

    async def both():
        events = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(first(*events), second(*events))

    usual = 1.0 if chosen() == "reference" else 2.0
    seen = asyncio.run(both())
    if torch.__version__ >= (2, 14):  # before, tasks share the backend that compiled code reads
        assert seen == [1.0, usual]
    assert which(torch.zeros(())).item() == usual


def test_a_backend_can_be_chosen_inside_a_compiled_function(compilations):
    count, graphs = compilations

    @torch.compile(fullgraph=True, backend=count)
    def anchors(features, labels):
        with ck.backend("reference"):
            return ck.class_anchors(features, labels, 3)[0]

    with ck.backend("reference"):
        expected = ck.class_anchors(FEATURES, LABELS, 3)[0]
    usual = chosen()
    torch.testing.assert_close(anchors(FEATURES, LABELS), expected)
    assert len(graphs) == 1
    assert chosen() == usual


# --------------------------------------------------------------------------------------- a missing library warns once


@pytest.fixture
def without_native(monkeypatch):
    """A machine where pip found no compiler."""
    monkeypatch.setattr("contextrast_kernels.native.status", lambda device_type: "the native library is not built")
    monkeypatch.delenv("CONTEXTRAST_BACKEND", raising=False)
    _warn_once.cache_clear()
    yield
    _warn_once.cache_clear()


def test_a_missing_native_library_warns_once(without_native):
    with pytest.warns(RuntimeWarning, match=r"native backend cannot run.*slower.*native library is not built") as told:
        for _ in range(3):
            ck.edge_distance(MAP)
            ck.error_map(MAP, MAP)
    assert len(told) == 1


@pytest.fixture
def stderr_of_a_call_without_a_library(tmp_path):
    """A function that calls the library in a copy of the package without its native library, in another process."""
    source = pathlib.Path(ck.__file__).parent
    shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = (
        "import contextrast_kernels as ck, torch; print('imported'); ck.edge_distance(torch.zeros(1, 2, 2).long())"
    )

    def run(**environment):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run


def test_an_import_without_the_native_library_warns_once(stderr_of_a_call_without_a_library):
    """The copy stands for an installation where pip found no compiler."""
    told = stderr_of_a_call_without_a_library()
    assert told.count("the native library is not built: install a C++17 compiler") == 1
    assert "a slower one is used for error maps, distances and negatives" in told
    assert "native library" not in stderr_of_a_call_without_a_library(CONTEXTRAST_BACKEND="reference")


def test_a_source_folder_that_hides_the_installed_package_is_named(stderr_of_a_call_without_a_library, tmp_path):
    installed = tmp_path / "installed"
    (installed / "contextrast_kernels").mkdir(parents=True)
    (installed / "contextrast_kernels" / "_native.so").touch()
    told = stderr_of_a_call_without_a_library(PYTHONPATH=str(installed))
    assert f"from {tmp_path}, which hides the one installed in {installed}: start Python in another folder" in told


def test_asking_for_the_reference_silences_the_warning(without_native, monkeypatch, recwarn):
    with ck.backend("reference"):
        ck.edge_distance(MAP)
    monkeypatch.setenv("CONTEXTRAST_BACKEND", "reference")
    ck.edge_distance(MAP)
    assert not list(recwarn)


@pytest.fixture
def with_triton(monkeypatch):
    """A machine with a GPU on which the kernels run."""
    module = sys.modules[choose.__module__]  # the package's ``backend`` is the function
    monkeypatch.setattr(module, "_triton_status", lambda device_type: "ok")
    monkeypatch.setattr(module, "AMD", False)
    monkeypatch.delenv("CONTEXTRAST_BACKEND", raising=False)
    _warn_once.cache_clear()
    yield
    _warn_once.cache_clear()


def test_volumes_that_the_kernels_cannot_read_warn_once(with_triton):
    """Fake tensors stand for those of a GPU. The strides of contiguous and channels_last_3d volumes are readable."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        volume = torch.zeros(2, 3, 4, 6, 8, device="cuda")
        readable = [volume, volume.to(memory_format=torch.channels_last_3d), volume[:, :, 1:3], volume[:, 1:]]
        block = volume[..., 1:5, 2:7]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [choose_kernels([x], 4) for x in readable] == ["triton"] * 4
    with pytest.warns(
        RuntimeWarning, match=r"triton backend cannot run.*got strides \(.*Call \.contiguous\(\)"
    ) as told:
        assert [choose_kernels([volume, block], 4) for _ in range(3)] == ["reference"] * 3
    assert len(told) == 1


# -------------------------------------------------------------------------------------------------------------- MPS


def test_mps_tensors_raise_a_clear_error():
    """Fake tensors stand for those of an Apple GPU."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        labels = torch.zeros(1, 8, 8, dtype=torch.int64, device="mps")
        logits, features = torch.zeros(1, 3, 8, 8, device="mps"), torch.zeros(1, 4, 8, 8, device="mps")
        for call in (
            lambda: ck.error_map(logits, labels),
            lambda: ck.edge_distance(labels),
            lambda: ck.distance_transform(labels),
            lambda: ck.select_nearest(labels, labels, 0.5, num_classes=4),
            lambda: ck.bane_negatives(logits, labels),
            lambda: ck.class_anchors(features, labels, 3),
            lambda: ck.contextrast_loss([features], labels, logits, num_classes=3, layer_weights=(1.0,)),
            lambda: ck.ContextrastCriterion(3, layer_weights=(1.0,))([features], labels, logits),
            lambda: ck.PixelContrastLoss(3)(features, labels, logits),
            lambda: ck.metrics.ConfusionMatrix(3).update(logits, labels),
            lambda: ck.metrics.AlignmentUniformity(3).update(features, labels),
        ):
            with pytest.raises(RuntimeError, match=r"expected a tensor on the CPU or a CUDA device.*mps.*\.cpu\(\)"):
                call()


def test_the_doctor_says_that_mps_is_not_used(monkeypatch):
    from contextrast_kernels import doctor

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert any("MPS" in line and "float64" in line for line in doctor._devices())


# ---------------------------------------------------------------------------------------------------------------- AMD


@pytest.fixture
def rocm(monkeypatch):
    """A torch built for ROCm, with one GPU and Triton."""
    properties = SimpleNamespace(
        name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-", total_memory=192 << 30
    )
    module = sys.modules[choose.__module__]  # in the package the name backend is the function
    monkeypatch.setattr(module, "AMD", True)
    monkeypatch.setattr(module, "_triton_status", lambda device_type: "ok")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.delenv("CONTEXTRAST_BACKEND", raising=False)
    _warn_once.cache_clear()
    yield SimpleNamespace(device=torch.device("cuda"))  # choose() reads nothing else of a tensor
    _warn_once.cache_clear()


def test_auto_takes_the_reference_on_amd_and_warns_once(rocm):
    with pytest.warns(RuntimeWarning, match=r"triton backend cannot run.*AMD GPUs but have never been run") as told:
        assert [choose(rocm, ("triton",)) for _ in range(3)] == ["reference"] * 3
    assert len(told) == 1


def test_triton_is_forced_on_amd(rocm, recwarn):
    with ck.backend("triton"):
        assert choose(rocm, ("triton",)) == "triton"
    assert not list(recwarn)


def test_availability_on_amd_says_that_the_kernels_were_never_run(rocm):
    assert "compile for AMD GPUs but have never been run" in ck.available()["triton"]
    assert ck.available()["reference"] == "ok"


def test_the_doctor_names_an_amd_gpu_and_checks_its_kernels(rocm):
    from contextrast_kernels import doctor

    assert "cuda:0: AMD Instinct MI300X, gfx942:sramecc+:xnack-, 192 GiB" in doctor._devices()
    assert "triton on cuda against the reference" in dict(doctor._checks())
