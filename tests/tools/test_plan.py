"""The launches and the memory of a training step, calculated from shapes and observed through torch."""

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
    from contextrast_kernels.plan import GRAIN, WRITTEN, Watch, moved, named_tensors, training_step

PAPER = ["cityscapes", "ade20k", "camvid"]
MOST_LAUNCHES = 24
MOST_MEMORY = {"cityscapes": 0.025, "ade20k": 0.05, "camvid": 0.05}


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", PAPER)
def test_a_step_stays_within_its_limits_of_launches_and_memory(name, layout):
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


def _contents(arguments: dict) -> dict[tuple[str, int], list]:
    """By name and address, the bytes of each tensor among the arguments of a launch."""
    return {
        (name, x.data_ptr()): x.cpu().contiguous().view(-1).view(torch.uint8).tolist()
        for name, x in named_tensors(arguments.items())
    }


def test_the_plan_lists_the_arguments_that_each_kernel_writes(rng, monkeypatch):
    """Bytes are counted from the table WRITTEN: run on the interpreter, kernels change the arguments that it names."""
    changed = {}

    def watched(kernel, grid, arguments, constants):
        before = _contents(arguments)
        launch(kernel, grid, arguments, constants)
        changes = {
            name for (name, address), content in _contents(arguments).items() if content != before[name, address]
        }
        assert changes <= set(WRITTEN[kernel.__name__]), kernel.__name__
        changed.setdefault(kernel.__name__, set()).update(changes)

    launch = _launch.launch
    monkeypatch.setattr(_launch, "launch", watched)
    labels, predictions = scene(rng, 1, 3, 8, 8)
    x = (100 * torch.randn(1, 4, 4, 4)).requires_grad_()
    rows, row_labels = torch.randn(3, 4).requires_grad_(), torch.tensor([0, 0, 1])
    with ck.backend("triton"):
        for base_rate in (0.0, 0.5):
            options = {"num_classes": 3, "layer_weights": (1.0,), "base_rate": base_rate, "normalize": False}
            ck.contextrast_loss([x], labels, predictions, **options).backward()
        ck.pixel_anchor_loss(x, labels, torch.randn(3, 4), negatives=labels[:, :4, :4].roll(1, 0)).backward()
        ck.class_anchors(torch.full((1, 4, 4, 4), torch.nan), labels, 3)
        ck.info_nce(rows, row_labels, torch.randn(400, 4), torch.randint(0, 2, (400,))).backward()
    assert WRITTEN.keys() == changed.keys()
    # The interpreter has no tensor cores, so it copies no rows and keeps no norms.
    unseen = {(name, argument) for name, found in changed.items() for argument in set(WRITTEN[name]) - found}
    assert unseen == {("_class_anchors_fwd", "norms")}


def test_the_bytes_of_a_launch_are_those_of_its_tensors():
    """A launch moves its layers' share of a map with one number a pixel, and one sector of the labels a pixel."""
    sizes = [(4, 8), (2, 3)]  # rows of 3 pixels cannot be read 16 bytes at a time: two launches a sweep
    launches = training_step(2, sizes, 16, 4).launches
    (codes,) = [moved(launch) for launch in launches if launch.kernel.__name__ == "_label_codes"]
    pixels = [2 * h * w for h, w in sizes]
    labels = 2 * 4 * (8 * 32) + 2 * 2 * (3 * 32)
    seed, counts_and_drawn = 8, 8 * (2 * 4 + 2)
    assert codes == (labels + sum(pixels) + seed, sum(pixels) + counts_and_drawn)
    forward = [moved(launch) for launch in launches if launch.kernel.__name__ == "_class_anchors_fwd"]
    counts, sums_and_broken = 8 * 2 * 4, 8 * 2 * 4 * (16 + 1)
    assert forward == [(n * (16 * 2 + 1) + counts, sums_and_broken) for n in pixels]


def test_every_block_of_the_dense_sweep_has_a_place_to_write(monkeypatch):
    """Also where rows that cannot be read 16 bytes at a time are taken in shorter pieces than the tiles say."""
    tiles_of = _log_sums.tiles_of
    monkeypatch.setattr(_log_sums, "tiles_of", lambda *names: tiles_of(*names)._replace(P=64))
    launches = training_step(1, [(17, 128), (9, 70), (9, 67)], 16, 3, torch.float32, base_rate=1.0).launches
    dense = [launch for launch in launches if launch.kernel.__name__ == "_dense_similarities"]
    assert [launch.constants["TILES"].P for launch in dense] == [64, 32]
    (partials,) = {launch.arguments["partial"].shape[1] for launch in dense}
    assert partials == sum(launch.grid[0] for launch in dense) == 6 + 2 * (2 * 3)


def test_the_recorder_measures_peak_memory():
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
def test_step_calls_only_the_planned_aten_ops(rng, base_rate):
    """The only ops of torch in a step are the seed's copy and advance, the fill of the sums, and autograd's gradient of
    the loss. ``training_step`` counts them. Kernels are recorded and not run."""
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
def test_device_activity_stays_within_launch_limit(name):
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
