"""The loss of the pixels of many ranks against the loss of the same pixels in one process.

Four gloo processes run all cases once, in groups of one, two and four. The results of every rank are returned and
compared here.
"""

import gc
import re
import weakref

import numpy as np
import pytest
import torch
from group_runs import (
    BACKENDS,
    CASES,
    COMPILED,
    COUNTED,
    LAYERS,
    ON_GPUS,
    QUICK,
    QUICKLY_COUNTED,
    RUNS,
    SIZES,
    TOLERANCE,
    WEIGHTS,
    D,
    N,
    batch,
    images_and_labels,
    loss_of,
    one_step,
    run_on_device,
    spawned,
    training,
)
from torch import distributed as dist

import contextrast_kernels as ck
from contextrast_kernels import contextrast, ranks

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo to run ranks on"
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The results of each rank."""
    runs = [(name, "reference") for name in CASES] + [(name, "triton") for name in QUICK]
    return spawned(tmp_path_factory.mktemp("ranks"), runs, True)


@pytest.fixture(scope="module")
def seen_slowly(tmp_path_factory):
    return spawned(
        tmp_path_factory.mktemp("slow_ranks"), [(name, "triton") for name in CASES if name not in QUICK], False
    )


# ------------------------------------------------------------------------------------------------------------ tests


def single(name):
    with ck.backend("reference"):
        return one_step(loss_of(name), *batch(name))


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 1e-2, equal_nan=True)


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_ranks_get_the_loss_and_gradient_of_one_process(request, name, backend):
    case = CASES[name]
    seen = request.getfixturevalue("seen_slowly" if backend == "triton" and name not in QUICK else "seen")
    loss, gradients, report = single(name)
    if case.broken:
        assert loss.isnan()
    elif "anywhere" not in name:
        assert loss > 0.1
    members = [seen[rank]["cases"][name, backend] for rank in range(len(case.images))]
    for mine, _, my_report in members:
        close(mine, loss, TOLERANCE[case.dtype])
        assert torch.equal(mine, members[0][0]) or case.broken
        for key, value in report.items():
            if value.is_floating_point():
                close(my_report[key], value, TOLERANCE[case.dtype])
            else:
                assert torch.equal(my_report[key], value), key
    for i, gradient in enumerate(gradients):
        # DDP would divide by the number of ranks.
        averaged = torch.cat([mine[i] for _, mine, _ in members]) / len(members)
        if not case.broken:
            scale = gradient.abs().max() if gradient.numel() else 0
            assert ((averaged - gradient).abs() <= TOLERANCE[case.dtype] * scale).all()


@pytest.mark.parametrize(
    ("backend", "name", "ranks"),
    [
        *(("reference", name, "seen") for name in COUNTED),
        *(("triton", name, "seen") for name in QUICKLY_COUNTED),
        *(
            pytest.param("triton", name, "seen_slowly", marks=pytest.mark.slow)
            for name in COUNTED
            if name not in QUICKLY_COUNTED
        ),
    ],
)
def test_a_step_reduces_three_times_forward_and_at_most_once_backward(request, backend, name, ranks):
    """They reduce as many numbers per layer as docs/distributed.md says. There is one maximum more if exponents have no
    small bound, and in the fused loss another if features have none."""
    if backend == "reference":
        first, third, backward = N * (D + 1) + 2, N + 1, [N * (D + 1) + 2]
    else:
        first, third, backward = N * (D + 2) + 2, N * (2 * D + 3), []
    forward = [first, N, third]
    if name in ("features as they are", "a cold temperature"):
        forward.insert(1, N)
    if name == "features as they are" and backend == "triton":
        forward.insert(0, 1)
    for rank in range(2):
        shapes = request.getfixturevalue(ranks)[rank]["counted", backend, name]
        counts = [[np.prod(shape) / LAYERS for shape in pass_] for pass_ in shapes]
        assert counts == [forward, backward]


@pytest.mark.parametrize("ranks", ["seen", pytest.param("seen_slowly", marks=pytest.mark.slow)])
def test_ddp_steps_are_the_steps_of_one_process(request, ranks):
    images, labels = images_and_labels()
    with ck.backend("reference"):
        losses, parameters, seed = training(lambda net: net, images, labels)
    assert losses[0] != losses[-1]
    for rank in range(2):
        my_losses, my_parameters, my_seed = request.getfixturevalue(ranks)[rank]["trained"]
        close(torch.stack(my_losses), torch.stack(losses), 1e-8)
        for mine, parameter in zip(my_parameters, parameters, strict=True):
            close(mine, parameter, 1e-8)
        assert torch.equal(my_seed, seed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_compiled_in_one_graph_equals_eager(seen, backend):
    for rank in range(2):
        loss, gradients, _ = seen[rank]["cases"][COMPILED, "reference"]
        compiled_loss, compiled_gradients, frames = seen[rank]["compiled", backend]
        assert frames == [1, 1]
        close(compiled_loss, loss, 1e-9)
        for compiled_gradient, gradient in zip(compiled_gradients, gradients, strict=True):
            close(compiled_gradient, gradient, 1e-9)


def test_every_rank_raises_if_options_differ(seen):
    first, second = (seen[rank]["disagreements"] for rank in range(2))
    assert first == second
    of_layers = "{} channels in {} layers of {}".format
    assert {
        what: re.search(r"got (.*) on rank 0 and (.*) on rank 1\. Use", said).groups()
        for what, said in first.items()
        if what != "after all"
    } == {
        "num_classes": ("num_classes=4", "num_classes=5"),
        "channels": (of_layers(5, 2, "float64"), of_layers(10, 2, "float64")),
        "dtype": (of_layers(5, 2, "float64"), of_layers(5, 2, "float16")),
        "layers": (
            of_layers(5, 2, "float64") + ", layer_weights=(1.0, 0.6)",
            of_layers(5, 1, "float64") + ", layer_weights=(1.0,)",
        ),
        "backend": ("backend 'reference'", "backend 'triton'"),
        "temperature": ("temperature=0.1", "temperature=0.001"),
        "weights": ("layer_weights=(1.0, 0.6), base_rate=0.0", "layer_weights=(1.0, 1.6), base_rate=0.1"),
    }
    assert all(
        said.startswith("ValueError: group: expected the same on all ranks") for said in list(first.values())[:-1]
    )
    assert first["after all"] == "no error"


def test_a_rank_that_calls_alone_raises_after_the_timeout(seen):
    said, one_by_one, together = zip(seen[0]["alone"], seen[1]["alone"])
    assert all("expected all 2 ranks to call the loss with a kind of loss, as rank" in each for each in one_by_one)
    assert said[1].startswith("RuntimeError: group: expected all 2 ranks to call the loss with num_classes=5; ")
    assert together == ("no error", "no error")


def test_ranks_compare_once_per_kind_and_clean_the_store(seen):
    assert [seen[rank]["left in store"] for rank in range(4)] == [[(0, 1), (0, 1), (0, 2)]] * 4


def test_a_second_derivative_is_refused(seen):
    assert all("once_differentiable" in seen[rank]["second derivative"] for rank in range(2))


def test_a_loss_with_a_group_is_copied_and_pickled(seen):
    assert "group=" in seen[0]["copies"]


def test_a_destroyed_group_raises_a_clear_error(seen):
    for rank in range(4):
        for sentence in (seen[rank]["destroyed"], seen[rank]["destroyed, at construction"]):
            assert sentence.startswith("RuntimeError: group: expected an existing process group"), sentence


@pytest.mark.parametrize("bound", [None, 1.0, 300.0, 301.0, 745.0, 5000.0])
def test_log_sums_keep_their_range(one_rank, bound):
    """They are shifted by the bound, or by the largest exponent if float64 cannot hold the exponentials."""
    size = 5000.0 if bound is None else bound
    log_sums = torch.tensor([-size, -0.5 * size, 0.0, size, -torch.inf], dtype=torch.float64)
    found = ranks.log_sum_exp(log_sums, ranks.name_of(dist.group.WORLD), bound)
    torch.testing.assert_close(found, log_sums, rtol=1e-12, atol=1e-12)
    assert ranks.log_sum_exp(torch.tensor([torch.nan]), ranks.name_of(dist.group.WORLD), bound).isnan()


@pytest.mark.skipif(ck.available()["triton"] != "ok", reason=f"triton: {ck.available()['triton']}")
def test_sums_over_ranks_do_not_modify_their_inputs(one_rank, monkeypatch):
    monkeypatch.setattr(ranks, "reduced", lambda x, *_: 2 * x.detach())
    features, labels, _ = batch("two ranks")
    errors = torch.tensor([7, 3])
    e = torch.full((3 * sum(h * w for h, w in SIZES),), 255, dtype=torch.uint8)
    options = (N, 255, list(WEIGHTS), 0.2, 0.7, 0.0, True, False, False, errors)
    seed, name = torch.zeros((), dtype=torch.int64), ranks.name_of(dist.group.WORLD)
    _, _, report, *_ = contextrast._contextrast_loss(features, labels, e, [], seed, *options, name, None)
    assert report[3].tolist() == [14, 6]
    assert errors.tolist() == [7, 3]


def test_the_criterion_passes_its_group_to_the_loss(one_rank):
    features, labels, predictions = batch("two ranks")
    logits = torch.nn.functional.one_hot(predictions, N).movedim(-1, 1).double()
    losses = []
    for group in (None, dist.group.WORLD):
        criterion = ck.ContextrastCriterion(N, layer_weights=WEIGHTS, group=group)
        assert criterion.contrast.options.group == ranks.name_of(group)
        losses.append(criterion(features, labels, logits))
    close(losses[1], losses[0], 1e-9)


def test_comparisons_are_forgotten_with_their_group(one_rank):
    ck.ranks.agree(ck.ranks.name_of(dist.group.WORLD), "a kind of loss")
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()
    assert group() is None


# -------------------------------------------------------------------------------------------------------------- GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("world", [1, 2])
def test_gpus_get_the_loss_of_one_process_without_synchronisation(tmp_path, world):
    if not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices; there is {torch.cuda.device_count()}")
    torch.multiprocessing.spawn(run_on_device, args=(str(tmp_path), world, "cuda", "nccl"), nprocs=world)
    check_devices([torch.load(tmp_path / f"{rank}.pt") for rank in range(world)])


def check_devices(seen):
    for name in ON_GPUS:
        loss, gradients, report = single(name)
        tolerance = TOLERANCE[CASES[name].dtype]
        matrix = ck.metrics.ConfusionMatrix(N)
        matrix.update(*batch(name)[:0:-1])
        for my_loss, _, my_report, scores in (results[name] for results in seen):
            close(my_loss, loss, tolerance)
            for key in ("classes", "positives", "negatives", "errors"):
                assert torch.equal(my_report[key], report[key]), key
            torch.testing.assert_close(scores, matrix.compute(), rtol=0, atol=0, equal_nan=True)
        for i, gradient in enumerate(gradients):
            averaged = torch.cat([results[name][1][i] for results in seen]) / len(seen)
            assert ((averaged - gradient).abs() <= tolerance * gradient.abs().max()).all()
