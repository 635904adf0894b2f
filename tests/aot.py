"""Compiles kernels ahead of time, as the ops would launch them, and reads the machine code: no GPU needed.

Runs in a process of its own, because Triton decides at import whether kernels are interpreted:

    python tests/aot.py --dtype bfloat16 --arch 90 --channels 256 --classes 19      a table
    python tests/aot.py ... --json                                                   the same for
    tests/test_resources.py
"""

import argparse
import collections
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from contextrast_kernels.kernels import _launch, anchors, contextrast, pixel_anchor

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


OPS = ("class_anchors", "pixel_anchor_loss", "contextrast_loss", "contextrast_loss_dense")
SIZES = [(128, 256), (64, 128), (32, 64), (16, 32)]


def launches(op: str, dtype: torch.dtype, channels: int, classes: int, layout: str, normalize: bool = True):
    """What an op launches, forward and backward, at a real size; tensors on the meta device, so nothing is
    allocated."""
    if op.startswith("contextrast_loss"):
        dense = 0.3 if op.endswith("dense") else 0.0
        return contextrast.plan(8, SIZES, channels, classes, dtype, layout=layout, base_rate=dense, normalize=normalize)
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    features = torch.empty(8, channels, *SIZES[0], dtype=dtype, device="meta").to(memory_format=form)
    labels = torch.empty(8, 512, 1024, dtype=torch.int64, device="meta")
    with _launch.recording() as recorded:
        if op == "class_anchors":
            table, counts, y = anchors.forward(features, labels, classes, 255, normalize)
            anchors.backward(table, features, counts, y, normalize)
        else:
            rows = torch.empty(classes, channels, dtype=_launch.accumulator(dtype), device="meta")
            loss, _, y, terms = pixel_anchor.forward(features, labels, rows, None, None, 0.1, 255, normalize)
            pixel_anchor.backward(loss, features, y, terms, 0.1, normalize)
    return recorded


def describe(value):
    """Signature of one argument: type, constant, and what Triton would find divisible by 16 (addresses; integers
    are not specialised)."""
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


def compile_launch(launch: _launch.Launch, arch: int):
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
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(launch: _launch.Launch, arch: int) -> dict:
    start = time.perf_counter()
    compiled = compile_launch(launch, arch)
    seconds = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run(
            [TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage.stdout)}
    instructions = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", code)
    return {
        "kernel": launch.kernel.fn.__name__,
        "registers": found["REG"],
        "stack": found["STACK"],
        "shared": compiled.metadata.shared,
        "instructions": len(instructions),
        "mma": sum(op.startswith(("HMMA", "HGMMA", "DMMA", "UTCHMMA", "UTCQMMA", "UTC")) for op in instructions),
        "wide_loads": sum(op.startswith("LDG") and ".128" in op for op in instructions),
        "narrow_loads": sum(op.startswith("LDG") and (".U16" in op or ".U8" in op) for op in instructions),
        "loads": dict(collections.Counter(op for op in instructions if op.startswith(("LDG", "STG")))),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--layout", nargs="+", default=["nchw", "channels_last"])
    parser.add_argument("--channels", nargs="+", type=int, default=[256])
    parser.add_argument("--classes", nargs="+", type=int, default=[19])
    parser.add_argument("--arch", nargs="+", type=int, default=[90])
    parser.add_argument("--kernel", nargs="+", help="only these")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for op in options.op:
        for dtype in options.dtype:
            for layout in options.layout:
                for D in options.channels:
                    for N in options.classes:
                        for launch in launches(op, getattr(torch, dtype), D, N, layout):
                            if options.kernel and launch.kernel.fn.__name__ not in options.kernel:
                                continue
                            for arch in options.arch:
                                case = {"op": op, "dtype": dtype, "layout": layout, "D": D, "N": N, "arch": arch}
                                rows.append(case | resources(launch, arch))
                                if not options.json:
                                    print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.json:
        json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
