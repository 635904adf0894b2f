"""The number of kernels that a step launches and of ops that it calls.

The counts come from a process of its own, because in this one Triton's kernels are interpreted.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import json, torch
import recording
from benchmarks import host
with recording.launches_recorded() as launched:
    counts = {name: recording.count(call, launched)._asdict() for name, call in host.calls(torch.device("cpu")).items()}
print(json.dumps(counts))
"""

COMPILING = """
import json, torch
from unittest import mock
import contextrast_kernels as ck
import recording
from contextrast_kernels.kernels import _launch
from triton.runtime.jit import JITFunction

def loss(dtype=torch.float32, sizes=((4, 64), (2, 32)), offset=0, labels=torch.int64, form=torch.contiguous_format,
         D=16, num_classes=4, **options):
    features = []
    for h, w in sizes:
        x = torch.zeros(h * w * D + offset, dtype=dtype)[offset:].view(1, D, h, w)
        features.append(x.to(memory_format=form).requires_grad_())
    y = torch.zeros(1, 8, 128, dtype=labels)
    logits = torch.zeros(1, num_classes, 8, 128)
    ck.contextrast_loss(
        features, y, logits, num_classes=num_classes, **{"layer_weights": (1.0, 0.7), **options}
    ).backward()

variants = [
    {}, {}, {"temperature": 0.2}, {"ignore_index": -100}, {"ignore_index": 2**40}, {"num_classes": 3},
    {"num_classes": 9}, {"labels": torch.uint8}, {"dtype": torch.float16}, {"dtype": torch.float64}, {"offset": 1},
    {"offset": 4}, {"D": 32}, {"form": torch.channels_last}, {"sizes": ((4, 48), (3, 16))},
    {"sizes": ((4, 63), (2, 31))}, {"base_rate": 0.5}, {"base_rate": 1.0}, {"normalize": False},
    {"layer_weights": (1.0, 0.5)}, {"normalize_anchors": True}, {"seed": 5}, {"layer_weights": (0.3, 0.7)}, {},
]

def compiled_by_variant():
    with recording.launches_recorded():
        stub, counts = JITFunction._do_compile, []
        for variant in variants:
            compiled = []
            with mock.patch.object(JITFunction, "_do_compile", lambda *a: compiled.append(a[0].__name__) or stub(*a)):
                loss(**variant)
            counts.append(sorted(compiled))
    return counts

ours = compiled_by_variant()
with mock.patch.object(_launch, "_what_compiling_depends_on", lambda *_: [object()]):
    print(json.dumps([ours, compiled_by_variant()]))
"""


def outcome_of(program):
    """What a program prints as JSON, in a process whose kernels are not interpreted."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join(map(str, (ROOT, pathlib.Path(__file__).parent)))
    here = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}  # the counts are the same on every machine
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=inherited | here)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def counts():
    return outcome_of(PROGRAM)


@pytest.mark.parametrize("name", ["contextrast_loss", "class_anchors"])
def test_a_kernel_is_launched_once_for_all_layers(counts, name):
    launches = counts[name]["launches"]
    assert launches
    assert len(launches) == len(set(launches)), launches


def test_the_module_adds_two_ops_to_the_function(counts):
    """Its seed is copied, then advanced."""
    of_module, of_function = (sum(counts[name]["ops"].values()) for name in ("ContextrastLoss", "contextrast_loss"))
    assert of_module - of_function <= 2


def test_a_compiled_kernel_is_used_again_exactly_where_triton_would():
    """Compiled kernels are looked up by our key. With a key that never repeats, Triton's own key decides."""
    ours, triton = outcome_of(COMPILING)
    assert ours == triton
    assert ours[0] and not ours[1] and not ours[-1] and any(ours[2:])
