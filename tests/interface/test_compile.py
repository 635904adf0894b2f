"""torch.compile without a graph break, no host synchronisation, and no Python loop over pixels, images or classes."""

import numpy as np
import pytest
import torch
from inputs import logits_of, pyramid, scene
from observers import Compilations, Dispatched
from torch.utils._pytree import tree_map

import contextrast_kernels as ck

pytestmark = pytest.mark.usefixtures("reference")

SIZES = ((8, 12), (4, 6), (2, 3), (1, 2))


def inputs(B=2, N=4, D=5, H=16, W=24, scale=1, sizes=SIZES):
    """Everything the public functions take, as one dictionary of tensors."""
    rng = np.random.default_rng(7)
    labels, predictions = scene(rng, B=B, N=N, H=H, W=W)
    features = pyramid(rng, B=B, D=D, sizes=[(h * scale, w * scale) for h, w in sizes], dtype=torch.float32)
    h, w = features[0].shape[-2:]
    return {
        "features": features,
        "labels": labels,
        "predictions": predictions,
        "logits": logits_of(predictions, N, rng),
        "anchors": torch.from_numpy(rng.standard_normal((N, D))).float(),
        "top": torch.from_numpy(rng.standard_normal((N, D))).float(),
        "counts": torch.from_numpy(rng.integers(0, 3, N)),
        "negatives": torch.from_numpy(rng.integers(-1, N, (B, h, w))),
        "base": torch.from_numpy(rng.random((B, h, w)) < 0.3),
        "rows": torch.from_numpy(rng.standard_normal((3 * B * scale, D))).float(),
        "row_labels": torch.from_numpy(rng.integers(-1, N, 3 * B * scale)),
        "columns": torch.from_numpy(rng.standard_normal((5 * B * scale, D))).float(),
        "column_labels": torch.from_numpy(rng.integers(-1, N, 5 * B * scale)),
        "seed": torch.tensor(5),
        "num_classes": N,
    }


def select(x):
    squared = torch.where(x["predictions"] > 0, x["predictions"] * 3, 0).int()
    return ck.select_nearest(x["predictions"], squared, 0.4, num_classes=4, seed=x["seed"])


FUNCTIONS = {
    "class_anchors": lambda x: ck.class_anchors(x["features"][0], x["labels"], x["num_classes"]),
    "fuse_anchors": lambda x: ck.fuse_anchors(x["anchors"], x["counts"], x["top"], x["counts"].flip(0)),
    "pixel_anchor_loss": lambda x: ck.pixel_anchor_loss(
        x["features"][0], x["labels"], x["anchors"], negatives=x["negatives"], base=x["base"]
    ),
    "error_map": lambda x: ck.error_map(x["logits"], x["labels"]),
    "edge_distance": lambda x: ck.edge_distance(x["predictions"] - 1),
    "distance_transform": lambda x: ck.distance_transform(x["predictions"] > 0, squared=True),
    "select_nearest": select,
    "bane_negatives": lambda x: ck.bane_negatives(
        x["logits"], x["labels"], size=x["features"][1].shape[-2:], seed=x["seed"]
    ),
    "bane_negatives, full": lambda x: ck.bane_negatives(
        x["predictions"],
        x["labels"],
        num_classes=x["num_classes"],
        size=x["features"][1].shape[-2:],
        distance_at="full",
    ),
    "contextrast_loss": lambda x: ck.contextrast_loss(
        x["features"], x["labels"], x["logits"], num_classes=x["num_classes"], seed=x["seed"]
    ),
    "contextrast_loss, full": lambda x: ck.contextrast_loss(
        x["features"], x["labels"], x["predictions"], num_classes=x["num_classes"], base_rate=0.3, distance_at="full"
    ),
    "info_nce": lambda x: ck.info_nce(x["rows"], x["row_labels"], x["columns"], x["column_labels"]),
    "info_nce of rows": lambda x: ck.info_nce(x["rows"], x["row_labels"]),
}
FAST = [
    "class_anchors",
    "fuse_anchors",
    "pixel_anchor_loss",
    "error_map",
    "edge_distance",
    "select_nearest",
    "info_nce",
]
"""The functions that are compiled in every run. contextrast_loss is compiled in every run by the test of the module."""


def leaf(x):
    return x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def value_and_gradients(function, x):
    """Outputs of the function, and the gradients of every floating-point input the outputs depend on."""
    x = tree_map(leaf, x)
    out = function(x)
    flat = out if isinstance(out, tuple) else (out,)
    wanted = [*x["features"], x["anchors"], x["top"], x["rows"], x["columns"]]
    with_graph = [o.sum() for o in flat if o.requires_grad]
    gradients = torch.autograd.grad(sum(with_graph), wanted, allow_unused=True) if with_graph else ()
    return [o.detach() for o in flat], [torch.zeros(()) if g is None else g for g in gradients]


def assert_equal_to_eager(compiled, function, x):
    """Integer maps exactly; float32 numbers to the reordering of sums that a compiler may do."""
    for got, want in zip(value_and_gradients(compiled, x), value_and_gradients(function, x), strict=True):
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            if a.is_floating_point():
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(a, b)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compile_fully(function, **options):
    return torch.compile(function, fullgraph=True, **options)


def slow_unless(fast):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in FUNCTIONS]


@pytest.mark.parametrize("name", slow_unless(FAST))
def test_one_graph_equal_to_eager_and_no_second_compilation(name):
    """Static shapes: value and gradient as in eager mode; new values of the same shapes do not compile again."""
    function, backend = FUNCTIONS[name], Compilations()
    compiled = compile_fully(function, backend=backend, dynamic=False)
    x = inputs()
    assert_equal_to_eager(compiled, function, x)
    assert backend.count == 1
    x["labels"], x["predictions"], x["seed"] = x["labels"].flip(1), x["predictions"].flip(2), x["seed"] + 1
    x["features"] = [-0.5 * f for f in x["features"]]
    assert_equal_to_eager(compiled, function, x)
    assert backend.count == 1


# No two sides are equal and none is 0 or 1: Dynamo takes equal numbers for one symbol, and 0 and 1 for constants.
ONE_SIZE = {"B": 2, "H": 33, "W": 58, "sizes": ((17, 29), (13, 15), (9, 12), (8, 11))}
WITH_DISTANCE = ("edge_distance", "distance_transform", "bane_negatives", "contextrast_loss")
OTHER_SIZE = {"B": 3, "H": 70, "W": 47, "sizes": ((31, 22), (16, 18), (14, 13), (7, 10))}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_dynamic_graph_serves_every_size(name):
    """One graph serves every size, except for the reference's distance transform, whose depth depends on the width."""
    function, backend = FUNCTIONS[name], Compilations()
    compiled = compile_fully(function, backend=backend, dynamic=True)
    assert_equal_to_eager(compiled, function, inputs(**ONE_SIZE))
    assert_equal_to_eager(compiled, function, inputs(**OTHER_SIZE))
    assert backend.count == 1 or name.startswith(WITH_DISTANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [(name, dynamic) for name in FUNCTIONS for dynamic in (False, True) if not (dynamic and "contextrast" in name)],
)
def test_inductor_equals_eager(name, dynamic):
    """The total loss with dynamic shapes is left out, because its C++ compiles for minutes. Its parts are here, and
    test_one_dynamic_graph_serves_every_size compiles the whole without Inductor."""
    function = FUNCTIONS[name]
    compiled = compile_fully(function, dynamic=dynamic)
    assert_equal_to_eager(compiled, function, inputs(**ONE_SIZE))
    if dynamic:
        assert_equal_to_eager(compiled, function, inputs(**OTHER_SIZE))


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiled_module_advances_its_seed_without_compiling_again(training):
    x, backend = inputs(), Compilations()
    x["features"] = x["features"][:2]
    eager, criterion = (
        ck.ContextrastLoss(4, layer_weights=(1.0, 0.5), base_rate=0.2).train(training) for _ in range(2)
    )
    compiled = compile_fully(criterion, backend=backend, dynamic=False)
    for step in range(3):
        features = [leaf(f) for f in x["features"]]
        loss = compiled(features, x["labels"], x["logits"])
        expected = eager(features, x["labels"], x["logits"])
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        for got, want in zip(*(torch.autograd.grad(value, features) for value in (loss, expected))):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert criterion.seed.item() == eager.seed.item() == (step + 1 if training else 0)
        for key, value in eager.last.items():
            torch.testing.assert_close(criterion.last[key], value, rtol=1e-6, atol=0)
    assert backend.count == 1


@pytest.mark.slow
def test_a_whole_training_step_compiles_with_inductor():
    head, x = ck.ProjectionHead(5, dim=4), inputs()
    criterion = ck.ContextrastLoss(4)

    def step(features, labels, logits):
        return criterion([head(f) for f in features], labels, logits)

    compile_fully(step)(x["features"], x["labels"], x["logits"]).backward()
    compiled = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    ck.contextrast_loss([head(f) for f in x["features"]], x["labels"], x["logits"], num_classes=4).backward()
    for got, parameter in zip(compiled, head.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- dispatched ops


def dispatched_ops(function, **sizes):
    x = inputs(**sizes)
    with Dispatched() as mode:
        value_and_gradients(function, x)
    return mode.count


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_synchronisation_and_a_constant_number_of_ops(name):
    """Forward and backward need no op more for more images or classes. With 64 times the pixels they need less than
    twice as many, for the levels of a divide and conquer along one side. A loop over rows would need eight times as
    many.
    """
    function = FUNCTIONS[name]
    small = dispatched_ops(function)
    assert small > 0
    assert dispatched_ops(function, B=9) == small
    assert dispatched_ops(function, N=37) == small
    assert dispatched_ops(function, scale=8, H=128, W=192) < 2 * small


@pytest.mark.parametrize("training", [True, False])
def test_the_module_does_not_synchronise(training):
    x = inputs()
    criterion = ck.ContextrastLoss(4).train(training)
    with Dispatched():
        criterion([leaf(f) for f in x["features"]], x["labels"], x["logits"]).backward()


@pytest.mark.parametrize(
    "use", [torch.nonzero, lambda t: t.sum().item(), lambda t: t[t > 0], lambda t: bool((t > 0).any())]
)
def test_the_detector_finds_a_synchronisation(use):
    with pytest.raises(AssertionError, match="wait"), Dispatched():
        use(torch.arange(4))
