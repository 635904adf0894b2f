"""The number of kernels that a step launches, of ops that it calls and of tensors that it allocates.

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
import json, sys, torch
from benchmarks import host
code = host.main(["--rounds", "2"])
device = torch.device("cpu")
with host.launching(device) as launched:
    counts = {name: host.count(call, launched)._asdict() for name, call in host.calls(device).items()}
print(json.dumps(counts))
sys.exit(code)
"""

COMPILING = """
import json, torch
from unittest import mock
import contextrast_kernels as ck
from benchmarks import host
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
    with host.launching(torch.device("cpu")):
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


def run(*arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""}  # the counts are the same on every machine
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=inherited | hidden | environment
    )


@pytest.fixture(scope="module")
def outcome():
    done = run("-c", PROGRAM)
    assert done.returncode == 0, done.stdout + done.stderr
    *printed, counts = done.stdout.splitlines()
    return json.loads(counts), printed


@pytest.mark.parametrize("name", ["contextrast_loss", "class_anchors"])
def test_a_kernel_is_launched_once_for_all_layers(outcome, name):
    launches = outcome[0][name]["launches"]
    assert launches
    assert len(launches) == len(set(launches)), launches


def test_the_module_adds_two_ops_to_the_function(outcome):
    """Its seed is copied, then advanced."""
    of_module, of_function = (sum(outcome[0][name]["ops"].values()) for name in ("ContextrastLoss", "contextrast_loss"))
    assert of_module - of_function <= 2


def test_every_cost_is_printed(outcome):
    costs = {line[:42].strip(): float(line[42:].split()[0]) for line in outcome[1] if line[42:51].strip()[-2:-1] == "."}
    assert costs["plain custom_op         forward"] == 1
    assert costs["contextrast_loss        forward+backward"] > 1
    assert [name.split()[-1] for name in costs if name.startswith("negatives, native")] == ["forward"]


def test_the_host_benchmark_refuses_the_interpreter():
    done = run("-m", "benchmarks.host", "--rounds", "1", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "unset TRITON_INTERPRET" in done.stderr.splitlines()[-1]


def test_a_compiled_kernel_is_used_again_exactly_where_triton_would():
    """Compiled kernels are looked up by our key. With a key that never repeats, Triton's own key decides."""
    done = run("-c", COMPILING)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, triton = json.loads(done.stdout)
    assert ours == triton
    assert ours[0] and not ours[1] and not ours[-1] and any(ours[2:])
