"""Features of any model: ``attach`` finds the encoder's stages and taps them.

tap = ck.attach(model)                     # before the optimizer, DDP and torch.compile
logits = model(images)
loss = criterion(tap.features(), labels, logits)
tap.detach()                               # for export: the model is as it was
"""

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from contextrast_kernels import checks
from contextrast_kernels.attach.finder import find_stages, look_up
from contextrast_kernels.attach.tap import NAME, FeatureTap, split_heads
from contextrast_kernels.attach.trace import Layer, default_example, watch

__all__ = ["FeatureTap", "Layer", "attach", "split_heads"]

_FSDP = ("FullyShardedDataParallel", "FSDPModule")


@torch.inference_mode(False)  # the heads would be born without gradients
def attach(
    model: nn.Module,
    layers: str | Sequence[str] = "auto",
    example_input: Tensor | tuple | list | Mapping | None = None,
    dim: int = 256,
) -> FeatureTap:
    """Tap a model's encoder layers and give each a projection head; prints the table of what was chosen.

    The tap is registered as ``model.contextrast_heads``: optimizer, ``.to()``, ``state_dict()`` and DDP see its
    parameters. Attach after loading pretrained weights, and before the optimizer, DDP, FSDP and torch.compile are made.
    ``split_heads`` turns a checkpoint of the training into one of the plain model.

    Args:
        model: any module whose layers give maps (B, C, h, w) or (B, h, w, C), volumes (B, C, z, h, w) or
            (B, z, h, w, C), or tokens (B, L, C), which are taken to be in row-major order. Where a model orders them
            otherwise, as Hiera does, name layers that give maps.
        layers: names of modules, as in ``model.named_modules()``; ``"encoder[2]"`` is one map of an output that holds
            several, ``"encoder"`` its last four of stride 4 or more. ``"auto"`` follows which operation reads which
            result in one forward, and takes the last map of each resolution on the way from the image to the encoder's
            deepest map; of more than four the coarsest. docs/attach.md has the rules.
        example_input: what the model is called with once, in evaluation mode and without gradients, to see shapes: a
            tensor, a tuple of arguments, or a dict of keywords; one image is enough. None: a black image of 256 x 320
            pixels or volume of 64 x 96 x 64, with the channels of the first convolution.
        dim: D of the projected features.

    Returns:
        The tap. After each training forward ``tap.features()`` gives the projected maps, from high to low resolution.

    Raises:
        TypeError, ValueError: an argument that cannot be used, an unknown layer (the closest names are listed), no
            encoder that ``"auto"`` can tell from the rest (the candidates and the call to make are listed).
        RuntimeError: the model is attached, wrapped or compiled already, or cannot run on the example.

    Example:
        >>> tap = ck.attach(model)
        >>> criterion = ck.ContextrastCriterion(num_classes=19)
        >>> logits = model(images)
        >>> loss = criterion(tap.features(), labels, logits)
    """
    _check_model(model)
    checks.integer("dim", dim, low=1)
    if layers != "auto" and (
        isinstance(layers, str)
        or not isinstance(layers, Sequence)
        or len(layers) == 0
        or not all(isinstance(name, str) for name in layers)
    ):
        raise TypeError(f'layers: expected "auto" or a list of module names, got {checks.describe(layers)}')
    own = example_input is None
    calls, graph, reason = watch(model, default_example(model) if own else example_input, own)
    chosen, doubt = find_stages(calls, graph, reason) if layers == "auto" else (look_up(layers, calls), "")
    tap = FeatureTap(model, sorted(chosen, key=lambda layer: -layer.pixels), dim, doubt)
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or not distributed.get_rank():
        _show(tap.table())
    return tap


def _show(text: str) -> None:
    """Prints the text. Where standard output cannot take a character it is escaped; where it is closed nothing is
    printed. The model is attached already, so that an error here would leave it so without a tap in hand."""
    try:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))
    except (OSError, ValueError, LookupError):
        pass


def _check_model(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {checks.describe(model)}")
    kind = type(model).__name__
    # FSDP's by name, as importing it takes a second: a class of its own, or one that fully_shard put into a module's.
    sharded = any(c.__name__ in _FSDP for module in model.modules() for c in type(module).__mro__)
    if sharded or isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise RuntimeError(f"model: expected the plain model, got {kind}; attach to it first, then wrap or shard it")
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise RuntimeError(
                "model: expected it before torch.compile, which never sees hooks that come later, got "
                f"{name or 'the model itself'!r} compiled; attach first, then compile the model or its parts"
            )
        if isinstance(module, FeatureTap):
            raise RuntimeError(f"model: attached already, at {name!r}; use that tap, or call its detach() first")
    if hasattr(model, NAME):
        raise RuntimeError(f"model: expected no attribute {NAME!r}, the name the tap is registered under; rename it")
