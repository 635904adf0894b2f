"""Process groups: check that their ranks pass the same options, and reduce over them.

A group is passed by its name, a string that modules can copy and pickle and that torch.compile can trace.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed

from contextrast_kernels import checks


def name_of(group) -> str | None:
    """The name of a process group, after a check that this rank is in it; None for None."""
    if group is None:
        return None
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            "group: expected a torch.distributed process group with this rank in it, or None for this process alone, "
            f"got {checks.describe(group)}. Pass torch.distributed.group.WORLD for all ranks."
        )
    name = group.group_name
    size(name)  # raises if torch.distributed does not know the group
    return name


def _resolved(name: str):
    if distributed.is_initialized():
        try:
            return distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]  # torch declares a NewType of str
        except (KeyError, RuntimeError, ValueError):
            pass
    raise RuntimeError(
        f"group: expected an existing process group, got {name!r}, which torch.distributed does not know (any more). "
        "Call torch.distributed.init_process_group before you make the loss."
    )


def size(name: str) -> int:
    """The number of ranks."""
    return _resolved(name).size()


@dataclass
class _Agreed:
    """The comparisons that the ranks of a group have made."""

    exchanges: int = 0
    signatures: set[str] = field(default_factory=set)


_agreed: WeakKeyDictionary[object, _Agreed] = WeakKeyDictionary()
"""One entry per process group. It disappears with the group, because a later group may have the same name."""


def agree(name: str, signature: str, settings: str | None = None) -> None:
    """Check that all ranks pass the same settings; otherwise every rank raises the same error.

    Ranks compare through the group's store, on the host, the first time that a group uses a signature. No tensor is
    sent, no device waits, and later steps do nothing. A mismatch is therefore found before ranks wait in different
    reductions.

    Args:
        name: the group's name.
        signature: the settings that the number and the shapes of the reductions depend on, separated by "; ".
        settings: all settings to compare, in the same form. None: those of the signature.
    """
    settings = signature if settings is None else settings
    group = _resolved(name)
    known = _agreed.setdefault(group, _Agreed())
    if signature in known.signatures:
        return
    store, ranks = group.get_group_store(), range(group.size())
    key = f"contextrast_kernels/{known.exchanges}"
    keys = [f"{key}/{rank}" for rank in ranks]
    store.set(keys[group.rank()], settings)
    try:
        store.wait(keys)
    except RuntimeError as error:
        store.delete_key(keys[group.rank()])  # ranks that come later then wait here too, not in a reduction
        raise RuntimeError(
            f"group: expected all {len(ranks)} ranks to call the loss with {settings}, as rank {group.rank()} did, "
            "but some did not. Call it on all ranks, with the same options, backend, layers, channels and dtype."
        ) from error
    known.exchanges += 1
    first, *others = (store.get(each).decode() for each in keys)
    if store.add(key, 1) == len(ranks):  # all ranks have read; a later group may use this store and name
        for each in (*keys, key):
            store.delete_key(each)
    for rank, given in enumerate(others, 1):
        if given != first:
            pairs = [pair for pair in zip(first.split("; "), given.split("; ")) if pair[0] != pair[1]]
            expected, got = map(", ".join, zip(*pairs))
            raise ValueError(
                f"group: expected the same on all ranks, got {expected} on rank 0 and {got} on rank {rank}. "
                "Use the same options, backend, layers, channels and dtype on all ranks."
            )
    known.signatures.add(signature)


# Ranks compare once, while torch.compile traces; a compiled step does not repeat it.
size._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo reads the mark
agree._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as above


def reduced(x: Tensor, name: str, operation: str = "sum") -> Tensor:
    """The sum of all ranks' x, or their maximum, with the same bits on every rank. No gradient."""
    # Imported here, because only calls with a group need it.
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(
        collectives.all_reduce(x.detach().contiguous(), operation, name)  # type: ignore[arg-type]  # as above
    )


def gathered(x: Tensor, name: str) -> Tensor:
    """All ranks' x, which have one shape, concatenated along the first axis. No gradient."""
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(
        collectives.all_gather_tensor(x.detach().contiguous(), 0, name)  # type: ignore[arg-type]  # as above
    )


def add_up(parts: Sequence[Tensor], name: str) -> None:
    """Replace every tensor by its sum over the ranks, all in one reduction, which is in float64 if one of them is."""
    total = reduced(torch.cat([part.flatten() for part in parts]), name)
    for part, of_all in zip(parts, total.split([part.numel() for part in parts])):
        part.copy_(of_all.view_as(part))


def close_enough(bound: float | None) -> bool:
    """Whether sums of exp(x), |x| <= bound, need no shift in float64, which holds exp(709)."""
    return bound is not None and bound <= 300


def log_sum_exp(log_sums: Tensor, name: str, bound: float | None = None) -> Tensor:
    """log Σ exp over the ranks, elementwise. It is -inf where all are, and NaN where one is. No gradient.

    bound: a limit of the exponents' size. If it is ``close_enough``, one reduction is enough; otherwise the largest
    exponent is reduced first.
    """
    wide = log_sums.detach().double()
    shift: float | Tensor
    if bound is not None and close_enough(bound):
        shift = bound
    else:
        largest = reduced(wide, name, "max")
        shift = torch.where(largest.isfinite(), largest, 0.0)
    return (shift + reduced((wide - shift).exp(), name).log()).to(log_sums.dtype)


class Total(torch.autograd.Function):
    """The sum over the ranks. The backward pass adds up the gradients of all ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, name: str) -> Tensor:
        ctx.group = name
        return reduced(x, name)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        return reduced(gradient, ctx.group), None


class DifferentiableOnce(torch.autograd.Function):
    """The identity, with a second derivative that raises: it would need the first derivatives of the other ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient
