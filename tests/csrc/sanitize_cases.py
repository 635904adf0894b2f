"""Run small cases of the native library on a GPU for sanitize.sh, and compare the results with the CPU's."""

import pathlib
import sys

import numpy as np
import torch

sys.path[:0] = [str(pathlib.Path(__file__).parents[n]) for n in (1, 2)]

import native_cases  # noqa: E402

from contextrast_kernels import native  # noqa: E402

if native.status("cuda") != "ok":
    sys.exit(f"sanitize_cases.py: {native.status('cuda')}")

# Fresh memory is not filled here, so that initcheck sees reads of memory that was never written.
compared = 0
for name, op, arguments in native_cases.everything(np.random.default_rng(7), [(1, 1), (1, 40), (40, 1), (33, 64)]):
    expected, actual = (
        native_cases.call(op, [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments])
        for device in ("cpu", "cuda")
    )
    for got, want in zip(actual, expected, strict=True):
        if not torch.equal(got.cpu(), want):
            sys.exit(f"sanitize_cases.py: {name} differs from the CPU")
    compared += 1
print(f"{compared} calls equal the CPU's")
