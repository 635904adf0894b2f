"""What a training step puts on the device and holds there: counted from shapes, and on the way through torch."""

import pytest
import torch
from inputs import scene
from torch.utils._python_dispatch import TorchDispatchMode

import contextrast_kernels as ck
from contextrast_kernels import contextrast, native
from contextrast_kernels.cases import CASES

pytestmark = pytest.mark.skipif(ck.available()["triton"] != "ok", reason=f"triton: {ck.available()['triton']}")

if ck.available()["triton"] == "ok":
    from contextrast_kernels.kernels import _launch, _log_sums
    from contextrast_kernels.kernels.step import GRAIN, Watch, training_step

PAPER = ["cityscapes", "ade20k", "camvid"]
MOST_LAUNCHES = 24
MOST_MEMORY = {"cityscapes": 0.025, "ade20k": 0.05, "camvid": 0.05}


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", PAPER)
def test_a_step_keeps_to_its_launches_and_its_memory(name, layout):
    """Kernels, fills and copies, forward and backward; and of the features' bytes, calculated."""
    case = CASES[name]
    step = training_step(case.batch, case.sizes, case.channels, case.num_classes, torch.bfloat16, layout=layout)
    assert len(step.rows) <= MOST_LAUNCHES
    # One launch of each sweep, and one more where layers cannot be read 16 bytes at a time.
    grouped = name == "camvid" and layout == "nchw"
    assert len(step.rows) == 19 + 4 * grouped
    if step.peak is None:
        pytest.skip(f"peak memory: the selection's scratch is unknown; {native.status('cuda')}")
    assert step.peak <= MOST_MEMORY[name] * case.batch * case.channels * sum(h * w for h, w in case.sizes) * 2


def test_every_block_of_the_dense_sweep_has_a_place_to_write(monkeypatch):
    """Also where rows that cannot be read 16 bytes at a time are taken in shorter pieces than the tiles say."""
    tiles = _log_sums.tiles
    monkeypatch.setattr(_log_sums, "tiles", lambda *names: {**tiles(*names), "P": 64})
    launches = training_step(1, [(17, 128), (9, 70), (9, 67)], 16, 3, torch.float32, base_rate=1.0).launches
    dense = [launch for launch in launches if launch.kernel.__name__ == "_dense_similarities"]
    assert [launch.constants["P"] for launch in dense] == [64, 32]
    (partials,) = {launch.arguments["partial"].shape[1] for launch in dense}
    assert partials == sum(launch.grid[0] for launch in dense) == 6 + 2 * (2 * 3)


def test_the_watch_sees_what_is_held_at_once():
    with Watch() as watch:
        a = torch.empty(1000, dtype=torch.uint8, device="meta")
        b = a.view(10, 100)[1:]
        c = torch.zeros(10, device="meta")
        assert watch.live == 1024 + GRAIN
        del a
        assert watch.live == 1024 + GRAIN  # b holds it
        del b
        c.add_(1)
        torch.empty(10, device="meta")
    assert (watch.live, watch.peak) == (GRAIN, 1024 + GRAIN)
    assert watch.called == ["zeros", "add_"]


class Ops(TorchDispatchMode):
    """Names of all ops that may be work for a device, also of those that ops of this package call."""

    OURS = (native.bane_codes, contextrast._contextrast_loss, contextrast._contextrast_loss_backward)
    QUIET = ("empty", "detach", "alias", "view", "reshape", "as_strided", "split", "unbind", "select", "promote_types")

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        for op in self.OURS:
            if name == op._qualname:
                with self:  # func itself would be watched from outside only
                    return op._init_fn(*args, **kwargs)
        if not any(word in name for word in self.QUIET):
            self.called.append(name)
        return func(*args, **kwargs)


@pytest.mark.skipif(native.status("cpu") != "ok", reason=f"native library: {native.status('cpu')}")
@pytest.mark.parametrize("base_rate", [0.0, 0.3])
def test_no_op_sneaks_into_a_step(rng, base_rate):
    """Of torch's own ops a step calls the seed's copy and advance, the fill of the sums, and autograd's gradient of the
    loss: those that ``training_step`` counts. Kernels are recorded and not run."""
    labels, predictions = scene(rng, 2, 4, 16, 24)
    xs = [torch.randn(2, 8, h, w, dtype=torch.bfloat16, requires_grad=True) for h, w in ((4, 6), (2, 3))]
    criterion = ck.ContextrastLoss(4, layer_weights=(1.0, 0.5), base_rate=base_rate)
    with ck.backend("triton"), _launch.recording() as launches, Ops() as ops:
        torch.autograd.grad(criterion(xs, labels, predictions), xs)
    assert sorted(ops.called) == ["aten::add_", "aten::clone", "aten::ones_like", "aten::zeros"]
    step = training_step(2, [(4, 6), (2, 3)], 8, 4, base_rate=base_rate)
    assert [launch.kernel.__name__ for launch in launches] == [row.name for row in step.rows if row.programs]


@pytest.mark.gpu
@pytest.mark.parametrize("name", PAPER)
def test_the_device_is_given_no_more(name):
    """Kernels, memsets and copies as the profiler sees them on the device. Memory: test_kernels_at_real_sizes.py."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    case = CASES[name]
    shapes = [(case.batch, case.channels, h, w) for h, w in case.sizes]
    xs = [torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for shape in shapes]
    labels = torch.randint(0, case.num_classes, (case.batch, 4 * case.sizes[0][0], 4 * case.sizes[0][1])).cuda()
    predictions = torch.where(torch.rand(labels.shape, device="cuda") < 0.1, 0, labels)
    criterion = ck.ContextrastLoss(case.num_classes).cuda()
    for _ in range(2):
        torch.autograd.grad(criterion(xs, labels, predictions), xs)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        torch.autograd.grad(criterion(xs, labels, predictions), xs)
        torch.cuda.synchronize()
    on_device = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    assert 0 < len(on_device) <= MOST_LAUNCHES, on_device
