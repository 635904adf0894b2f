"""The ops as PyTorch sees them, with compiled kernels: their registration, torch.compile and autocast. The cases are
some of the contract's, whose kernels are compiled already."""

import pytest
import torch
from kernel_checks import run
from option_cases import QUICK, build
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .driver import emulated
from .test_contract import architecture


def case_of(op, dtype):
    return next(case for case in QUICK if (case.op, case.dtype) == (op, dtype))


CASES = [
    case_of("class_anchors", "bfloat16"),
    case_of("pixel_anchor_loss", "bfloat16"),  # hard negatives
    case_of("pixel_anchor_loss", "float16"),  # and base pixels
    case_of("contextrast_loss", "bfloat16"),  # hard negatives
    case_of("contextrast_loss", "float16"),  # and base pixels
    case_of("info_nce", "bfloat16"),
    case_of("info_nce", "float16"),  # a loss for each row
    case_of("info_nce", "float32"),  # rows against themselves, weights
]
WITHOUT_DISTANCES = case_of("contextrast_loss", "float32")  # which take long to trace
TRACED = [
    (case_of("class_anchors", "bfloat16"), False),
    (case_of("pixel_anchor_loss", "float16"), True),
    (WITHOUT_DISTANCES, True),
    (case_of("info_nce", "bfloat16"), True),
    (case_of("info_nce", "float16"), False),
]
"""Every day, with or without dynamic shapes."""
DYNAMIC = [
    pytest.param(
        *(case, dynamic),
        id=f"{case} dynamic={dynamic}",
        marks=[] if (case, dynamic) in TRACED else [pytest.mark.slow],
    )
    for case in [*CASES, WITHOUT_DISTANCES]
    for dynamic in (False, True)
]


class Recorded(TorchDispatchMode):
    """The package's ops that are called, each with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "contextrast":
            self.calls.setdefault(function, args)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ops_pass_opcheck(case):
    """Schema, fake tensors, autograd registration and AOT dispatch of every op, backward ops with what forward
    saved."""
    built = build(case)
    with emulated(architecture(case)):
        with Recorded() as recorded:
            run(built.loss, built.leaves)
        names = {function._schema.name for function in recorded.calls}
        assert {f"contextrast::{case.op}", f"contextrast::{case.op}_backward"} <= names
        places = {x.data_ptr() for x in built.leaves}
        for function, arguments in recorded.calls.items():
            forward = not function._schema.name.endswith("_backward")
            opcheck(
                function,
                tree_map_only(
                    torch.Tensor,
                    lambda x, forward=forward: x.detach().requires_grad_(forward and x.data_ptr() in places),
                    arguments,
                ),
            )


@pytest.mark.parametrize(("case", "dynamic"), DYNAMIC)
def test_one_compiled_graph_equals_eager(case, dynamic):
    """One graph, the bits of eager mode, and no compilation on the second call."""
    built = build(case)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(built.loss, backend=graphs, fullgraph=True, dynamic=dynamic)
    frames = []
    with emulated(architecture(case)):
        for leaves in (built.leaves, [-x for x in built.leaves]):
            built.exact.clear()  # a list that calls append to, whose length would be guarded
            for ours, theirs in zip(run(compiled, leaves), run(built.loss, leaves)):
                assert torch.equal(ours, theirs)
            frames.append(graphs.frame_count)
    assert frames[0] == frames[1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_call_for_many_samples(case):
    """torch.func.vmap, the labels shared by all samples."""
    built = build(case)
    samples = [torch.stack([x, x.roll(1, 0)]) for x in built.leaves]
    with emulated(architecture(case)):
        together = torch.func.vmap(built.loss)(*samples)
        one_by_one = torch.stack([built.loss(*(x[i] for x in samples)) for i in range(2)])
    assert torch.equal(together, one_by_one)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_autocast_changes_nothing(case):
    built = build(case)
    with emulated(architecture(case)):
        plain = run(built.loss, built.leaves)
        with torch.autocast("cpu", torch.bfloat16):
            cast = run(built.loss, built.leaves)
    assert all(map(torch.equal, plain, cast))
