"""Properties of every metric: any split into batches and any number of ranks give the same result, no update waits for
the device, and ignored pixels have no effect."""

import copy
import pickle

import literal
import numpy as np
import pytest
import torch
from metric_cases import (
    EMBEDDED,
    METRICS,
    ON_MAPS,
    N,
    arguments,
    embeddings,
    evaluated,
    every_metric,
    images_of,
    maps,
    same,
)
from observers import Dispatched
from processes import run_ranks

from contextrast_kernels.metrics import (
    AlignmentUniformity,
    BoundaryF1,
    ConfusionMatrix,
    TrimapIoU,
)


@every_metric
def test_any_split_into_batches_gives_the_same_result(name):
    whole = arguments(name, B=4)
    parts = [images_of(whole, slice(b, b + 1)) for b in range(4)]
    if name == "AnchorSimilarity":  # its anchors depend on the batch
        same(evaluated(name, whole, whole), evaluated(name, whole, whole))
        return
    same(evaluated(name, whole), evaluated(name, *parts), exact=name not in ("AlignmentUniformity", "BoundaryF1"))


@every_metric
def test_metrics_can_be_merged_reset_saved_and_copied(name):
    first, second = arguments(name, 1), arguments(name, 2)
    both = evaluated(name, first, second)
    one, other = (METRICS[name][0]() for _ in range(2))
    one.update(*first)
    other.update(*second)
    saved = copy.deepcopy(one).state_dict()
    one.merge(other)
    exact = name != "AlignmentUniformity"  # merging samples again
    if exact:
        same(one.compute(), both, exact=name != "BoundaryF1")
    other.load_state_dict(saved)
    for value in (*saved.values(), *other.state_dict().values()):
        value.zero_()  # what was saved is a copy, and so is what was loaded
    same(other.compute(), evaluated(name, first))
    other.update(*second)
    same(other.compute(), both)
    same(pickle.loads(pickle.dumps(other)).compute(), both)
    other.reset()
    assert other.state_dict() == {}
    other.update(*first)
    same(other.compute(), evaluated(name, first))


@every_metric
def test_results_without_a_batch_are_nan_and_not_zero(name):
    everything_ignored = arguments(name)
    everything_ignored = tuple(torch.full_like(a, 255) if i == 1 else a for i, a in enumerate(everything_ignored))
    no_images = images_of(arguments(name), slice(0, 0))
    for results in (evaluated(name), evaluated(name, no_images), evaluated(name, everything_ignored, no_images)):
        for key, value in results.items():
            if key == "pixels":
                assert value.sum() == 0
            elif key != "distance":
                assert value.isnan().all(), key
    same(evaluated(name, arguments(name), no_images), evaluated(name, arguments(name)))


@every_metric
def test_maps_of_one_pixel_are_scored(name):
    labels = torch.zeros(2, 1, 1, dtype=torch.uint8)
    x = [torch.ones(2, 3, 1, 1)]
    results = evaluated(name, METRICS[name][1](labels, labels, labels.int() + 1, x))
    if name == "ConfusionMatrix":
        assert results["miou"] == 1


@pytest.mark.parametrize("name", ON_MAPS)
def test_a_right_prediction_scores_one_whatever_is_predicted_at_ignored_pixels(name):
    labels, _, instances = maps(seed=3)
    valid = (labels >= 0) & (labels < N)
    for noise in (0, 1, N, -1):
        predictions = torch.where(valid, labels, noise)
        results = evaluated(name, METRICS[name][1](labels, predictions, instances, None))
        for key, value in results.items():
            assert (value.isnan() | (value == 1)).all(), (noise, key)
            assert value.ndim or not value.isnan(), key


@pytest.mark.parametrize("name", [name for name in METRICS if name != "AlignmentUniformity"])
def test_predictions_at_ignored_pixels_have_no_effect(name):
    labels, predictions, instances = maps(seed=5)
    x = embeddings(sizes=((14, 17),))
    noisy = torch.where((labels >= 0) & (labels < N), predictions, torch.arange(17) % N)
    assert (noisy != predictions).any()
    same(
        evaluated(name, METRICS[name][1](labels, predictions, instances, x)),
        evaluated(name, METRICS[name][1](labels, noisy, instances, x)),
    )


@pytest.mark.parametrize("name", [name for name in METRICS if name != "AlignmentUniformity"])
def test_logits_and_class_maps_of_other_sizes_are_resized(name):
    labels, _, instances = maps(H=13, W=17)
    small = maps(seed=8, H=6, W=9)[1].remainder(N)
    x = embeddings(sizes=((13, 17),))
    grown = torch.from_numpy(literal.resize(small.numpy(), (13, 17)))
    expected = evaluated(name, METRICS[name][1](labels, grown, instances, x))
    same(evaluated(name, METRICS[name][1](labels, small, instances, x)), expected)

    logits = torch.from_numpy(np.random.default_rng(0).standard_normal((3, N, 6, 9)))
    if name == "AnchorSimilarity":  # it uses the loss's errors, so it samples like the loss
        resized = literal.resize(logits.numpy(), (13, 17))
    else:
        resized = literal.resize_bilinear(logits.numpy(), (13, 17))
    resized = torch.from_numpy(literal.predicted_classes(resized))
    expected = evaluated(name, METRICS[name][1](labels, resized, instances, x))
    same(evaluated(name, METRICS[name][1](labels, logits, instances, x)), expected)
    same(evaluated(name, METRICS[name][1](labels, logits.float(), instances, x)), expected)


@every_metric
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_label_types_and_strides_do_not_matter(name, dtype):
    labels, predictions, instances = maps(seed=6)
    labels[labels < 0], predictions = 255, predictions.remainder(N)
    x = embeddings()
    expected = evaluated(name, METRICS[name][1](labels, predictions, instances, x))

    def strided(t):
        return torch.stack((t, t), -1)[..., 0]

    typed = (strided(t.to(dtype)) for t in (labels.unsqueeze(1), predictions, instances))
    x = [strided(layer).to(memory_format=torch.channels_last) for layer in x]
    same(evaluated(name, METRICS[name][1](*typed, x)), expected, exact=name not in EMBEDDED)


@pytest.mark.parametrize("name", ["AlignmentUniformity", "AnchorSimilarity"])
def test_half_precision_is_computed_in_float32_under_autocast_too(name):
    labels, predictions, instances = maps()
    x = [layer.half() for layer in embeddings()]
    expected = evaluated(name, METRICS[name][1](labels, predictions, instances, [layer.float() for layer in x]))
    same(evaluated(name, METRICS[name][1](labels, predictions, instances, x)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        same(evaluated(name, METRICS[name][1](labels, predictions, instances, x)), expected)


@every_metric
def test_a_metric_updated_in_inference_mode_can_be_updated_outside_it(name):
    batch = arguments(name)
    metric = METRICS[name][0]()
    with torch.inference_mode():
        metric.update(*batch)
    for a in batch:
        for t in a if isinstance(a, list) else [a]:
            if t.is_floating_point():
                t.requires_grad_()
    metric.update(*batch)
    assert not any(value.requires_grad for value in metric.state_dict().values())
    same(metric.compute(), evaluated(name, batch, batch))


@every_metric
def test_an_update_never_waits_for_the_device(name):
    batch = arguments(name)
    metric = METRICS[name][0]()
    with Dispatched():
        metric.update(*batch)
        metric.update(*batch)
        metric.compute()


SLOW_TO_COMPILE = ("AnchorSimilarity", "BoundaryF1", "InstanceIoU")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_TO_COMPILE else name for name in METRICS]
)
def test_an_update_compiles_into_one_graph(name):
    torch._dynamo.reset()
    batch = arguments(name)
    metric = METRICS[name][0]()
    compiled = torch.compile(metric.update, fullgraph=True, backend="aot_eager")
    compiled(*batch)
    compiled(*batch)
    same(metric.compute(), evaluated(name, batch, batch), exact=name not in EMBEDDED)


def test_results_are_float64_scalars_and_vectors_under_names_that_do_not_clash():
    names = []
    for name in METRICS:
        results = evaluated(name, arguments(name))
        names += results
        for key, value in results.items():
            if key not in ("distance", "pixels"):
                assert value.dtype == torch.float64
            if name != "AnchorSimilarity":
                assert value.shape == ((N,) if key.endswith("per_class") else (3,) if key.endswith("category") else ())
    assert len(set(names)) == len(names)


@pytest.mark.gpu
@every_metric
def test_a_gpu_gives_the_same_result_without_waiting(name):
    batch = arguments(name)
    on_gpu = tuple([t.cuda() for t in a] if isinstance(a, list) else a.cuda() for a in batch)
    metric = METRICS[name][0]()
    metric.update(*on_gpu)  # the first compiles kernels and moves options
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    results = metric.compute()
    assert all(value.is_cuda for value in results.values())
    exact = name not in ("AlignmentUniformity", "AnchorSimilarity", "BoundaryF1")
    expected = evaluated(name, batch, batch)
    same({key: value.cpu() for key, value in results.items()}, expected, exact)
    again = evaluated(name, on_gpu, on_gpu)
    same(again, results)  # bit for bit


# ------------------------------------------------------------------------------------------------------------- ranks


def on_rank(rank, folder, ranks):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    outcome = {}
    for name in METRICS:
        metric = METRICS[name][0]()
        outcome[name, "nothing"] = metric.compute()
        if rank == 1:  # the other rank has seen nothing yet
            metric.update(*arguments(name, 1))
        outcome[name, "one"] = metric.compute()
        metric.update(*arguments(name, 2 + rank, B=1 + rank))
        outcome[name, "both"] = metric.compute()
        outcome[name, "state"] = metric.state_dict()
        alone = METRICS[name][0](group=None)
        alone.load_state_dict(metric.state_dict())
        outcome[name, "alone"] = alone.compute()
        given = METRICS[name][0](group=dist.group.WORLD)
        given.load_state_dict(metric.state_dict())
        outcome[name, "given"] = given.compute()
        only_first = dist.new_group([0])
        if rank == 0:
            subset = METRICS[name][0](group=only_first)
            subset.load_state_dict(metric.state_dict())
            outcome[name, "subset"] = subset.compute()
    maps = torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2).long()
    features = torch.ones(1, 2 + rank, 2, 2), maps[1]
    for what, metric, batch in (
        ("classes", ConfusionMatrix(4 + rank), maps),
        ("radii", TrimapIoU(4, radii=(1, 2 + rank)), maps),
        ("kind", (ConfusionMatrix, BoundaryF1)[rank](4), maps),
        ("nothing seen", ConfusionMatrix(4, ignore_index=255 - rank), None if rank else maps),
        ("channels", AlignmentUniformity(4), features),
    ):
        if batch is not None:
            metric.update(*batch)
        try:
            metric.compute()
        except ValueError as error:
            outcome["disagreement", what] = str(error)
    torch.save(outcome, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_results_of_one_process(tmp_path):
    run_ranks(on_rank, str(tmp_path), 2, ranks=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in METRICS:
        for when in ("nothing", "one", "both", "given"):
            same(first[name, when], second[name, when])
        one, other = (METRICS[name][0]() for _ in range(2))
        one.load_state_dict(first[name, "state"])
        other.load_state_dict(second[name, "state"])
        same(first[name, "alone"], one.compute())
        same(first[name, "subset"], one.compute())
        same(second[name, "alone"], other.compute())
        one.merge(other)
        same(first[name, "both"], one.compute())
        same(first[name, "given"], one.compute())
        if name == "AlignmentUniformity":
            for key in ("uniformity", "uniformity_1", "uniformity_3"):
                batches = arguments(name, 2, B=1), arguments(name, 1), arguments(name, 3, B=2)
                torch.testing.assert_close(first[name, "both"][key], evaluated(name, *batches)[key])
        else:
            same(first[name, "one"], evaluated(name, arguments(name, 1)), exact=name not in EMBEDDED)
            batches = arguments(name, 2, B=1), arguments(name, 1), arguments(name, 3, B=2)
            same(first[name, "both"], evaluated(name, *batches), exact=name not in (*EMBEDDED, "BoundaryF1"))
        same(first[name, "nothing"], evaluated(name))
    for what in ("classes", "radii", "kind", "nothing seen"):
        for said in (first["disagreement", what], second["disagreement", what]):
            assert ": expected the same metric and options on every rank, got others on the ranks [1]" in said
    said = first["disagreement", "channels"]
    assert said == second["disagreement", "channels"] and "expected the same channels and layers on every rank" in said


def test_ranks_draw_different_samples():
    drawn = []
    for rank in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            patch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            quality = AlignmentUniformity(N, samples=8)
            quality.update(*arguments("AlignmentUniformity"))
        drawn.append(quality.state_dict()["priority"])
    assert not torch.equal(*drawn)
