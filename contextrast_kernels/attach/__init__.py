"""Get the features of any model: ``attach`` finds the encoder's stages and taps them.

tap = ck.attach(model)                     # before the optimizer, DDP and torch.compile
logits = model(images)
loss = criterion(tap.features(), labels, logits)
tap.detach()                               # removes hooks and heads, for export
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


@torch.inference_mode(False)  # otherwise the heads' parameters could not have gradients
def attach(
    model: nn.Module,
    layers: str | Sequence[str] = "auto",
    example_input: Tensor | tuple | list | Mapping | None = None,
    dim: int = 256,
) -> FeatureTap:
    """Tap a model's encoder layers and add a projection head to each; print a table of the chosen layers.

    The tap is registered as ``model.contextrast_heads``, so the optimizer, ``.to()``, ``state_dict()`` and DDP include
    its parameters. Attach after loading pretrained weights and before making the optimizer, DDP, FSDP or torch.compile.
    ``split_heads`` removes the heads from a training checkpoint.

    Args:
        model: any module whose layers give maps (B, C, h, w) or (B, h, w, C), volumes (B, C, z, h, w) or
            (B, z, h, w, C), or tokens (B, L, C) in row-major order. If a model orders its tokens differently, as Hiera
            does, name layers that give maps.
        layers: names of modules, as in ``model.named_modules()``. ``"encoder[2]"`` is one map of an output that holds
            several, and ``"encoder"`` its maps of stride 4 or more: all of them up to four; of more, the last of each
            size, or the last four if all have one size. ``"auto"`` records which operation reads which result in one
            forward and takes the last map of each resolution between the image and the encoder's deepest map, at most
            the coarsest four. docs/attach.md has the rules.
        example_input: the input of one forward in evaluation mode and without gradients, from which shapes are read: a
            tensor, a tuple of arguments, or a dict of keywords; one image is enough. None: a black image of 256 x 320
            pixels or a black volume of 64 x 96 x 64, with the channels of the first convolution.
        dim: D of the projected features.

    Returns:
        The tap. After each training forward ``tap.features()`` gives the projected maps, from high to low resolution.

    Raises:
        TypeError, ValueError: an argument cannot be used, a layer is unknown (the closest names are listed), or
            ``"auto"`` cannot tell an encoder from the rest (the candidates and the call to make are listed).
        RuntimeError: the model is already attached, wrapped or compiled, or cannot run on the example.

    Examples:
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
        raise TypeError(
            f'layers: expected "auto" or a list of module names, got {checks.describe(layers)}. '
            "Choose names from model.named_modules()."
        )
    own = example_input is None
    calls, graph, reason = watch(model, default_example(model) if own else example_input, own)
    chosen, doubt = find_stages(calls, graph, reason) if layers == "auto" else (look_up(layers, calls), "")
    tap = FeatureTap(model, sorted(chosen, key=lambda layer: -layer.pixels), dim, doubt)
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or not distributed.get_rank():
        _show(tap.table())
    return tap


def _show(text: str) -> None:
    """Print the text; escape characters that standard output cannot encode, and ignore a closed one.

    An error here would leave the model attached, but the caller without the tap.
    """
    try:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))
    except (OSError, ValueError, LookupError):
        pass


def _check_model(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {checks.describe(model)}. Pass the network that is trained."
        )
    kind = type(model).__name__
    # FSDP is recognised by the name of the module's class or of one of its bases, because importing it takes a second.
    sharded = any(c.__name__ in _FSDP for module in model.modules() for c in type(module).__mro__)
    if sharded or isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise RuntimeError(f"model: expected the plain model, got {kind}. Attach first, then wrap or shard it.")
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise RuntimeError(
                "model: expected a model before torch.compile, which ignores hooks that are added later, got "
                f"{name or 'the model itself'!r} compiled. Attach first, then compile the model or its parts."
            )
        if isinstance(module, FeatureTap):
            raise RuntimeError(
                f"model: expected a model without a tap, got one attached at {name!r}. Use that tap or detach() it."
            )
    if hasattr(model, NAME):
        raise RuntimeError(
            f"model: expected no attribute {NAME!r}, because the tap is registered under this name. Rename it."
        )
