"""Compiles kernels ahead of time for AMD GPUs, as a torch for ROCm would launch them, and reads the machine code.

    python tests/aot_amd.py --arch gfx942 gfx1100 --dtype bfloat16 [--kernel _class_anchors_fwd] [--json]

Runs in a process of its own, because torch must look like a build for ROCm before the kernels are imported. None of
these kernels has run on an AMD GPU.
"""

import argparse
import json
import re
import sys
import time

import torch

torch.version.hip = "compiled ahead of time"

import aot  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

LANES = {"gfx90a": 64, "gfx942": 64, "gfx1100": 32, "gfx1201": 32}
"""The lanes of a wavefront."""


def resources(launch, arch: str) -> dict:
    start = time.perf_counter()
    source, options = aot.source_of(launch)
    target = GPUTarget("hip", arch, LANES[arch])
    with aot.compiling_for(target):
        compiled = triton.compile(ASTSource(fn=launch.kernel, **source), target=target, options=options)
    code = compiled.asm["amdgcn"]

    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", code)[1])

    return {
        "kernel": launch.kernel.fn.__name__,
        "arch": arch,
        "registers": number("vgpr_count"),
        "spilled": number("vgpr_spill_count"),
        "stack": number("private_segment_fixed_size"),
        "shared": compiled.metadata.shared,
        "kinds": sorted(set(re.findall(r"^\s+(v_(?:mfma|wmma)_\w+)", code, re.MULTILINE))),
        "wide_loads": len(re.findall(r"(?:buffer|global)_load_(?:dwordx4|b128)", code)),
        "seconds": round(time.perf_counter() - start, 2),
    }


def rows(options):
    for arch in options.arch:
        known = set()
        for dtype in options.dtype:
            for negatives in options.negatives:
                case = aot.Case("contextrast_loss", dtype, options.channels, layout=options.layout, negatives=negatives)
                with aot.compiling_for(GPUTarget("hip", arch, LANES[arch])):
                    launches = aot.all_launches(case)
                for launch in launches:
                    source = (launch.kernel.fn.__name__, *map(str, aot.source_of(launch)))
                    if source in known or (options.kernel and source[0] not in options.kernel):
                        continue
                    known.add(source)
                    row = {"dtype": dtype, "negatives": negatives, **resources(launch, arch)}
                    if not options.json:
                        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                    yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=LANES, default=list(LANES))
    parser.add_argument("--dtype", nargs="+", choices=aot.DTYPES, default=["bfloat16"])
    parser.add_argument("--negatives", nargs="+", choices=("hard", "base", "all"), default=["hard"])
    parser.add_argument("--layout", choices=aot.LAYOUTS, default="nchw")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--kernel", nargs="+", help="compile only these")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = list(rows(options))
    if options.json:
        json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
