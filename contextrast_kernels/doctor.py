"""Print versions, devices and backends of this machine, and run a self-check of a few seconds."""

import argparse
import functools
import importlib.metadata
import platform
import time
from collections.abc import Callable

import torch

import contextrast_kernels as ck
from contextrast_kernels import checks, hashing, native
from contextrast_kernels.backend import untried_on_amd

OPS = {
    "reference": "every op, on any device",
    "triton": "class_anchors, pixel_anchor_loss, contextrast_loss, info_nce",
    "native": "error_map, edge_distance, distance_transform, select_nearest, bane_negatives",
}
PACKAGES = ("torch", "triton", "numpy", "kornia", "scikit-image", "matplotlib", "tqdm")


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m contextrast_kernels doctor", description=__doc__).parse_args(arguments)
    print(f"contextrast_kernels {ck.__version__}, Python {platform.python_version()}, {platform.platform()}\n")
    for name in PACKAGES:
        print(f"  {name:14} {_version(name)}")
    print()
    for line in _devices():
        print(f"  {line}")
    print("\nbackends")
    statuses = {"reference": "ok", "triton": ck.available()["triton"]}
    statuses |= {f"native, {device}": native.status(device) for device in ("cpu", "cuda")}
    for name, status in statuses.items():
        print(f"  {name:14} {OPS[name.split(',')[0]]}\n{'':17}{status}")
    print("\nself-check")
    failures = sum(not _run(name, check) for name, check in _checks())
    print(
        "\nall checks passed" if not failures else f"\n{failures} checks failed. Please file an issue with this output."
    )
    return 1 if failures else 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    lines = [f"CPU: {torch.get_num_threads()} threads"]
    if torch.backends.mps.is_available():
        lines.append(f"MPS: not used. {checks.WITHOUT_FLOAT64}")
    if not torch.cuda.is_available():
        built = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        if not (torch.version.hip or torch.version.cuda):
            built = "the CPU only"
        return [*lines, f"CUDA: no device (torch was built for {built})"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        arch = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        lines.append(f"cuda:{i}: {properties.name}, {arch}, {memory:.0f} GiB")
    return lines


def _run(name: str, check: Callable[[], str]) -> bool:
    start = time.perf_counter()
    try:
        detail, passed = check(), True
    except Exception as error:  # a self-check reports whatever went wrong and goes on with the next one
        detail, passed = f"{type(error).__name__}: {error}", False
    print(f"  {'ok  ' if passed else 'FAIL'} {name}: {detail} ({time.perf_counter() - start:.1f} s)")
    return passed


def _checks() -> list[tuple[str, Callable[[], str]]]:
    checks = [
        ("hash", _check_hash),
        ("edge distance against brute force", _check_distance),
        ("gradient against finite differences", _check_gradient),
    ]
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        if native.status(device) == "ok":
            checks.append((f"native on {device} against the reference", functools.partial(_check_native, device)))
    # The kernels have never been run on an AMD GPU, so this check shows whether they work there.
    if ck.available()["triton"] in ("ok", untried_on_amd()):
        checks.append((f"triton on {devices[-1]} against the reference", lambda: _check_triton(devices[-1])))
    return checks


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _check_hash() -> str:
    got = hashing.pixel_hash(0, 0, torch.tensor([0, 1, 2, 65535])).tolist()
    _expect(got == [0x4CB04C27, 0x671ABCBB, 0x6B7D565F, 0xE21576E6], f"got {got}")
    return "4 values"


def _scene(
    batch: int = 2, height: int = 24, width: int = 37, num_classes: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocky labels with an ignored strip, and predictions that are wrong in places."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, num_classes, (batch, height // 4 + 1, width // 4 + 1), generator=generator)
    labels = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :height, :width].clone()
    predictions = labels.roll((2, 3), (1, 2))
    labels[:, :2] = 255
    return labels, predictions


def _check_distance() -> str:
    labels, predictions = _scene()
    errors = ck.error_map(predictions, labels, num_classes=4)
    got = ck.edge_distance(errors, squared=True)
    measured = 0
    for image in range(errors.shape[0]):
        for n in range(4):
            inside = errors[image] == n
            # A pixel beyond the border repeats the one at the border, and so never makes an edge.
            around = torch.nn.functional.pad(inside[None].float(), (1, 1, 1, 1), mode="replicate")[0] > 0
            surrounded = around[1:-1, :-2] & around[1:-1, 2:] & around[:-2, 1:-1] & around[2:, 1:-1]
            points, edges = inside.nonzero(), (inside & ~surrounded).nonzero()
            if not len(edges) or not len(points):
                continue
            brute = ((points[:, None] - edges[None]) ** 2).sum(-1).amin(1)
            _expect(bool((got[image][inside] == brute).all()), f"image {image}, class {n} differs")
            measured += len(points)
    return f"{measured} pixels, equal"


def _check_gradient() -> str:
    generator = torch.Generator().manual_seed(1)
    labels, predictions = _scene()
    features = [torch.randn(2, 6, *size, generator=generator, dtype=torch.float64) for size in ((12, 18), (6, 9))]
    direction = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in features]

    def loss(step: float, leaves=None):
        moved = leaves or [x + step * d for x, d in zip(features, direction)]
        return ck.contextrast_loss(moved, labels, predictions, num_classes=4, layer_weights=(1.0, 0.5))

    leaves = [x.clone().requires_grad_() for x in features]
    with ck.backend("reference"):
        gradients = torch.autograd.grad(loss(0.0, leaves), leaves)
        numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
    analytic = torch.stack([(g * d).sum() for g, d in zip(gradients, direction)]).sum()
    relative = float((numeric - analytic).abs() / analytic.abs())
    _expect(relative < 1e-6, f"relative difference {relative:.1e}")
    return f"relative difference {relative:.1e}"


def _check_native(device: str) -> str:
    labels, predictions = (x.to(device) for x in _scene(4, 96, 133))
    results = {}
    for name in ("reference", "native"):
        with ck.backend(name):
            errors = ck.error_map(predictions, labels, num_classes=4)
            distance = ck.edge_distance(errors, squared=True)
            results[name] = (errors, distance, ck.select_nearest(errors, distance, 0.3, num_classes=4, seed=5))
    equal = all(torch.equal(a, b) for a, b in zip(results["reference"], results["native"]))
    _expect(equal, "a map differs")
    return "error map, distance and selection equal"


def _check_triton(device: str) -> str:
    generator = torch.Generator().manual_seed(2)
    labels, predictions = (x.to(device) for x in _scene())
    features = [torch.randn(2, 16, *size, generator=generator).to(device) for size in ((12, 18), (6, 9))]
    results = {}
    for name in ("reference", "triton"):
        leaves = [x.clone().requires_grad_() for x in features]
        with ck.backend(name):
            loss = ck.contextrast_loss(leaves, labels, predictions, num_classes=4, layer_weights=(1.0, 0.5))
            gradients = torch.autograd.grad(loss, leaves)
        results[name] = torch.cat([loss.detach().reshape(1), *(g.flatten() for g in gradients)])
    expected = results["reference"]
    relative = float((results["triton"] - expected).norm() / expected.norm())
    _expect(relative < 1e-4, f"relative difference {relative:.1e}")
    return f"loss and gradient, relative difference {relative:.1e}"
