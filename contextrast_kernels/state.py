"""Tensors that modules keep between batches: seeds, memory banks, class weights."""

import torch
from torch import Tensor


def lasting(value: Tensor, device: torch.device | None = None) -> Tensor:
    """Copy ``value`` to a device (None: its own) as an ordinary tensor, even under inference_mode.

    A later training step could neither change an inference tensor nor save it for the backward pass.
    """
    device = value.device if device is None else device
    if torch.compiler.is_compiling():  # Dynamo cannot ask whether a tensor is an inference tensor
        with torch.inference_mode(False):
            return value.to(device)
    if not torch.is_inference_mode_enabled():
        return value.to(device)
    with torch.inference_mode(False):
        value = value.to(device)
        return value.clone() if value.is_inference() else value
