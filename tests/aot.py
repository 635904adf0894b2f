"""Compiles kernels ahead of time, as the ops would launch them, and reads the machine code: no GPU needed.

Runs in a process of its own, because Triton decides at import whether kernels are interpreted:

    python tests/aot.py --dtype bfloat16 --arch 90 --channels 256 --classes 19      a table
    python tests/aot.py --matrix 0/12                                               a twelfth of every case there is
    python tests/aot.py ... --json                                                  rows for test_resources.py

The number of blocks per multiprocessor is calculated from registers, shared memory and warps. Nothing is run.
"""

import argparse
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from contextrast_kernels.kernels import _launch, anchors, contextrast, pixel_anchor
from contextrast_kernels.native import code_dtype
from contextrast_kernels.plan import info_nce_launches

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 164, 90: 228, 100: 228}
"""The shared memory of a multiprocessor in KiB, by architecture."""
DTYPES = ("bfloat16", "float16", "float32", "float64")


# ---------------------------------------------------------------------------------------------------------- the cases


class Case(NamedTuple):
    """The arguments of an op that its compiled kernels depend on."""

    op: str
    dtype: str = "bfloat16"
    D: int = 256
    N: int = 19
    layout: str = "nchw"
    sizes: str = "cityscapes"
    negatives: str = "hard"
    """hard: a map of negatives, given or BANE's; base: a map of base pixels, given or drawn; both: both of them; all:
    every pixel of a different class. For info_nce, its positives."""
    normalize: bool = True
    normalize_anchors: bool = False
    detach_anchors: bool = False
    arch: int = 90
    only: str = ""
    """The name of the only kernel to compile; "" compiles all that are launched."""


OPS = ("class_anchors", "pixel_anchor_loss", "contextrast_loss", "info_nce")
LAYOUTS = ("nchw", "channels_last", "slices", "mixed")
SIZES = {
    "cityscapes": (8, [(128, 256), (64, 128), (32, 64), (16, 32)]),
    "ade20k": (12, [(128, 128), (64, 64), (32, 32), (16, 16)]),
    # Rows of 120, 60, 30 and 15 pixels: most cannot be read 16 bytes at a time.
    "camvid": (16, [(90, 120), (45, 60), (23, 30), (12, 15)]),
    # One image past 2³¹ elements.
    "wide": (1, [(4096, 4096)]),
}
ROWS_AND_COLUMNS = {"1024 x 20000": (1024, 20000), "24 x 190000": (24, 190000), "1024 x itself": (1024, None)}


def matrix():
    """All cases: every kernel in every dtype on each architecture with 256, 512 and 720 channels; the paths of
    cityscapes and ade20k in both layouts; and each option that changes what is compiled, with dtype and architecture in
    turn."""
    layouts = itertools.cycle(LAYOUTS[:2])
    for dtype, arch in itertools.product(DTYPES, ARCHITECTURES):
        case = Case("contextrast_loss", dtype, layout=next(layouts), arch=arch)
        yield case
        yield case._replace(negatives="all")
    yield from paths()
    for D, dtype, arch in itertools.product((512, 720), DTYPES, ARCHITECTURES):
        case = Case("contextrast_loss", dtype, D, layout=next(layouts), arch=arch)
        yield case
        yield case._replace(negatives="all")
    for D, dtype, arch in itertools.product((256, 512, 720), DTYPES, ARCHITECTURES):
        yield Case("info_nce", dtype, D, sizes="1024 x 20000", negatives="each", arch=arch)
        yield Case("pixel_anchor_loss", dtype, D, arch=arch, only="_given_table")
        yield Case("class_anchors", dtype, D, normalize=False, arch=arch, only="_largest_features")
        for kernel in ("_anchor_tables", "_finish"):
            yield Case("contextrast_loss", dtype, D, normalize_anchors=True, arch=arch, only=kernel)
    options = [
        Case("info_nce", sizes="24 x 190000", negatives="each"),
        Case("info_nce", sizes="1024 x itself", negatives="pooled"),
        Case("info_nce", sizes="1024 x itself", negatives="supcon", D=64),
        Case("info_nce", sizes="1024 x 20000", negatives="supcon", D=512),
        Case("info_nce", sizes="1024 x itself", negatives="each", D=1024),
        Case("class_anchors"),
        Case("class_anchors", normalize=False, layout="channels_last"),
        Case("class_anchors", layout="slices", D=512),
        Case("class_anchors", sizes="wide", layout="channels_last"),
        Case("pixel_anchor_loss", layout="channels_last"),
        Case("pixel_anchor_loss", negatives="base", D=64),
        Case("pixel_anchor_loss", negatives="both", layout="channels_last", D=512),
        Case("pixel_anchor_loss", negatives="all", normalize=False),
        Case("pixel_anchor_loss", sizes="wide", negatives="both"),
        Case("contextrast_loss", normalize=False, layout="channels_last", negatives="base"),
        Case("contextrast_loss", normalize=False, D=512),
        Case("contextrast_loss", sizes="camvid", N=11),
        Case("contextrast_loss", sizes="camvid", N=11, negatives="base"),
        Case("contextrast_loss", sizes="camvid", N=11, layout="channels_last", D=64),
        Case("contextrast_loss", layout="mixed"),
        Case("contextrast_loss", layout="slices"),
        Case("contextrast_loss", layout="slices", negatives="all", D=64),
        Case("contextrast_loss", sizes="wide"),
        Case("contextrast_loss", N=1, D=8),
        Case("contextrast_loss", N=256, layout="channels_last", negatives="all"),
        Case("contextrast_loss", N=256),
        Case("contextrast_loss", detach_anchors=True),
        Case("contextrast_loss", detach_anchors=True, negatives="base", layout="channels_last"),
        Case("contextrast_loss", D=1024, layout="channels_last"),
        Case("contextrast_loss", D=1024, negatives="all"),
        Case("contextrast_loss", D=480, negatives="all"),
        Case("contextrast_loss", D=480),
    ]
    for i, case in enumerate(options):
        yield case._replace(dtype=DTYPES[i % 4], arch=ARCHITECTURES[i % 3])


def paths():
    """The cases of cityscapes and ade20k."""
    for arch, layout in itertools.product(ARCHITECTURES, LAYOUTS[:2]):
        yield Case("contextrast_loss", layout=layout, arch=arch)
        yield Case("contextrast_loss", N=150, sizes="ade20k", layout=layout, arch=arch)


def feature_map(case: Case, i: int, batch: int, h: int, w: int) -> torch.Tensor:
    """On the meta device: nothing is allocated."""

    def empty(*shape):
        return torch.empty(shape, dtype=getattr(torch, case.dtype), device="meta")

    if case.layout == "slices":
        return empty(batch, case.D, h, 2 * w)[..., ::2]
    last = case.layout == "channels_last" or (case.layout == "mixed" and i % 2)
    return empty(batch, case.D, h, w).to(memory_format=torch.channels_last if last else torch.contiguous_format)


def launches(case: Case) -> list[_launch.Launch]:
    """The launches of an op, forward and backward, that the case asks for."""
    with compiling_for(GPUTarget("cuda", case.arch, 32)):
        recorded = all_launches(case)
    return [launch for launch in recorded if case.only in ("", launch.kernel.fn.__name__)]


def compiling_for(target: GPUTarget):
    """Replace the driver, which kernels and their tiles ask for the architecture."""
    return mock.patch.object(triton.runtime.driver, "_active", SimpleNamespace(get_current_target=lambda: target))


def all_launches(case: Case) -> list[_launch.Launch]:
    if case.op == "info_nce":
        R, C = ROWS_AND_COLUMNS[case.sizes]
        return info_nce_launches(R, C, case.D, getattr(torch, case.dtype), case.negatives)
    batch, sizes = SIZES[case.sizes]
    features = [feature_map(case, i, batch, h, w) for i, (h, w) in enumerate(sizes)]
    x, (h, w) = features[0], sizes[0]

    def empty(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device="meta")

    labels = empty(batch, 4 * h, 4 * w, dtype=torch.int64)
    with _launch.recording() as recorded:
        if case.op == "class_anchors":
            table, counts, y = anchors.forward(x, labels, case.N, 255, case.normalize)
            anchors.backward(table, x, counts, y, case.normalize)
        elif case.op == "pixel_anchor_loss":
            rows = empty(case.N, case.D, dtype=_launch.accumulator(x.dtype))
            negatives = empty(batch, h, w, dtype=torch.int64) if case.negatives in ("hard", "both") else None
            base = empty(batch, h, w, dtype=torch.bool) if case.negatives in ("base", "both") else None
            loss, _, y, terms = pixel_anchor.forward(x, labels, rows, negatives, base, 0.1, 255, case.normalize)
            pixel_anchor.backward(loss, x, y, terms, 0.1, case.normalize)
        else:
            e = empty(sum(batch * h * w for h, w in sizes), dtype=code_dtype(case.N))
            rate = {"hard": 0.0, "base": 0.3, "all": 1.0}[case.negatives]
            seed, weights = empty(1, dtype=torch.int64), (1.0,) * len(sizes)
            outcome, y, terms = contextrast.forward(
                *(features, labels, e, [], seed, case.N, 255, weights, 0.1, 0.7, rate),
                *(case.normalize, case.normalize_anchors),
            )
            pull = None if case.detach_anchors else outcome.pull
            contextrast.backward(outcome.loss, features, y, terms, pull, 0.1, case.normalize)
    return recorded


# ---------------------------------------------------------------------------------------------------------- compiling


def describe(value):
    """Signature of one argument."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if value is None:
        return "constexpr"
    if isinstance(value, tuple):
        kinds = tuple(describe(item) for item in value)
        return type(value)(*kinds) if hasattr(value, "_fields") else kinds
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def walk(value, path):
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from walk(item, (*path, i))
    else:
        yield path, value


def source_of(launch: _launch.Launch) -> tuple[dict, dict]:
    """Signature, constants and attributes of a launch, and the compiler's options. Addresses that are multiples of 16
    are marked as such; integers are not specialised."""
    names = list(inspect.signature(launch.kernel.fn).parameters)
    options = {name: value for name, value in launch.constants.items() if name not in names}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        if name in launch.constants:
            signature[name] = "constexpr"
            constants[(i,)] = launch.constants[name]
            continue
        value = launch.arguments[name]
        signature[name] = describe(value)
        for path, item in walk(value, (i,)):
            if item is None:
                constants[path] = None
            elif isinstance(item, torch.Tensor):
                offset = item.storage_offset() * item.element_size()
                if offset % 16 == 0:
                    attributes[path] = [["tt.divisibility", 16]]
    missing = set(launch.arguments) - set(names)
    if missing:
        raise TypeError(f"{launch.kernel.fn.__name__} has no argument {missing}")
    return {"signature": signature, "constexprs": constants, "attrs": attributes}, options


def blocks_of_a_multiprocessor(registers: int, shared: int, warps: int, arch: int) -> int:
    """The number of blocks that a multiprocessor holds at once. It has 64 Ki registers, which a warp gets 256 at a
    time; its shared memory, of which each block takes 1 KiB more than it asks for; and room for 64 warps and 32
    blocks."""
    a_warp = -(-registers * 32 // 256) * 256
    return min(65536 // (a_warp * warps), SHARED_MEMORY[arch] * 1024 // (shared + 1024), 64 // warps, 32)


def resources(launch: _launch.Launch, arch: int) -> dict:
    start = time.perf_counter()
    source, options = source_of(launch)
    target = GPUTarget("cuda", arch, 32)
    with compiling_for(target):
        compiled = triton.compile(ASTSource(fn=launch.kernel, **source), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    instructions = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Za-z0-9_.]+)", code)
    products = [op for op in instructions if re.match(r"HMMA|HGMMA|DMMA|UTC\w*MMA", op)]
    warps = options["num_warps"]
    return {
        "kernel": launch.kernel.fn.__name__,
        "registers": found["REG"],
        "stack": found["STACK"],
        "shared": compiled.metadata.shared,
        "warps": warps,
        "blocks": blocks_of_a_multiprocessor(found["REG"], compiled.metadata.shared, warps, arch),
        "instructions": len(instructions),
        "products": len(products),
        "kinds": sorted(set(products)),
        "wide_loads": sum(op.startswith("LDG") and ".128" in op for op in instructions),
        "two_byte_loads": sum(op.startswith("LDG") and ".U16" in op for op in instructions),
        "wide_stores": sum(op.startswith("STG") and ".128" in op for op in instructions),
        "seconds": round(time.perf_counter() - start, 2),
    }


def compiled(cases):
    """One row of resources for each kernel that a case launches. Launches that compile to the same code are compiled
    once."""
    known = {}
    for case in cases:
        for launch in launches(case):
            source = (launch.kernel.fn.__name__, case.arch, *map(str, source_of(launch)))
            if source not in known:
                known[source] = resources(launch, case.arch)
                layout = launch.constants.get("LAYOUT")
                group = {"aligned": layout is not None and layout.align * getattr(torch, case.dtype).itemsize == 16}
                yield case._asdict() | group | known[source]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS[:3])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["nchw", "channels_last"])
    parser.add_argument("--sizes", nargs="+", choices=(*SIZES, *ROWS_AND_COLUMNS), default=["cityscapes"])
    negatives, forms = ("hard", "base", "all", "both"), ("each", "pooled", "supcon")
    parser.add_argument("--negatives", nargs="+", choices=(*negatives, *forms), default=["hard", "all"])
    parser.add_argument("--channels", nargs="+", type=int, default=[256])
    parser.add_argument("--classes", nargs="+", type=int, default=[19])
    parser.add_argument("--arch", nargs="+", type=int, default=[90])
    parser.add_argument("--matrix", metavar="i/n", help="part i of n of all cases, instead of the above")
    parser.add_argument("--kernel", nargs="+", help="print only these")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.matrix:
        part, parts = map(int, options.matrix.split("/"))
        # Cases that share kernels stay in one part.
        whole = sorted(set(matrix()), key=lambda case: (case.dtype, case.D, case.arch, case))
        cases = whole[len(whole) * part // parts : len(whole) * (part + 1) // parts]
    else:
        for op in options.op:
            known = (ROWS_AND_COLUMNS, forms) if op == "info_nce" else (SIZES, negatives)
            for given, expected in zip((options.sizes, options.negatives), known):
                if not set(given) <= set(expected):
                    parser.error(f"--op {op}: expected {', '.join(expected)}, got {', '.join(given)}")
        axes = (options.op, options.dtype, options.channels, options.classes, options.layout, options.sizes)
        cases = [
            Case(*axis, negatives=negatives, arch=arch)
            for *axis, negatives, arch in itertools.product(*axes, options.negatives, options.arch)
        ]
    rows = []
    for row in compiled(cases):
        rows.append(row)
        if not options.json and (not options.kernel or row["kernel"] in options.kernel):
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if options.json:
        json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
