"""Calls whose time on the host is measured: Python, dispatch, and the preparation of launches.

The sizes are so small that the arithmetic takes no time. A plain `torch.library.custom_op` with a gradient is measured
in the same run, as the yardstick. `python -m benchmarks.run --parts host` writes the rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import contextrast_kernels as ck
from contextrast_kernels import bane

PLAIN = "plain custom_op"


@torch.library.custom_op("contextrast_benchmarks::plain", mutates_args=())
def plain(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("contextrast_benchmarks::plain_backward", mutates_args=())
def plain_backward(gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient)


plain.register_autograd(lambda ctx, gradient: plain_backward(gradient))


def calls(device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Forward calls by name, the plain op first. Those that return a tensor with a graph also run backward."""
    # A row of 64 pixels, then 32, 16, 8: as with real sizes, every row can be read 16 bytes at a time.
    features = [torch.randn(1, 16, 1, 64 >> i, device=device).requires_grad_() for i in range(4)]
    labels = torch.randint(0, 4, (1, 4, 256), device=device)
    logits = torch.randn(1, 4, 1, 64, device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    x = torch.randn(8, device=device).requires_grad_()
    sizes = [tuple(f.shape[2:]) for f in features]
    criterion = ck.ContextrastLoss(4).to(device)
    chosen = (4, 0.5, "bane", "layer", 255, seed)
    return {
        PLAIN: lambda: plain(x),
        "contextrast_loss": lambda: ck.contextrast_loss(features, labels, logits, num_classes=4, seed=seed),
        "ContextrastLoss": lambda: criterion(features, labels, logits),
        "class_anchors": lambda: ck.class_anchors(features[0], labels, 4)[0],
        "negatives, native": lambda: bane.layer_negatives(logits, labels, sizes, *chosen)[1],
    }


def step(call: Callable[[], Tensor]) -> None:
    """Run a call forward, and backward if it has a gradient."""
    out = call()
    if out.requires_grad:
        out.backward(torch.ones_like(out))
