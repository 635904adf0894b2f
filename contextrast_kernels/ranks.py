"""The ranks of a process group that compute one loss together: what they must agree on, and their sums.

A group goes by its name, a string that modules can copy and pickle and torch.compile can trace.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed

from contextrast_kernels import checks

MOST_PIXELS = 2**24
"""Pixels of a layer that the fused loss takes on each rank of a group, so that all ranks know one bound of their
number, and with it the scale of fixed-point sums, without asking each other."""


def name_of(group) -> str | None:
    """The name of a process group that can be used; None for None."""
    if group is None:
        return None
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            "group: expected a torch.distributed process group with this rank in it, such as "
            f"torch.distributed.group.WORLD, or None for this process alone, got {checks.describe(group)}"
        )
    name = group.group_name
    size(name)  # it is there
    return name


def _resolved(name: str):
    if distributed.is_initialized():
        try:
            return distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]  # a str by another name
        except (KeyError, RuntimeError, ValueError):
            pass
    raise RuntimeError(
        f"group: expected a process group of torch.distributed as it is initialised now, got group {name!r}, which is "
        "not (or no longer) part of it; call torch.distributed.init_process_group before the loss is made"
    )


def size(name: str) -> int:
    """The number of ranks."""
    return _resolved(name).size()


@dataclass
class _Agreed:
    """What the ranks of a group have told each other."""

    exchanges: int = 0
    kinds: set[str] = field(default_factory=set)


_agreed: WeakKeyDictionary[object, _Agreed] = WeakKeyDictionary()
"""By process group, and as long as there is one: another may bear its name later."""


def agree(name: str, kind: str, facts: str | None = None) -> None:
    """All ranks come with the same facts, a list with "; " between them; else every rank raises the same sentence.

    They compare through the group's store, on the host and once for each group and kind: no tensor is sent and no
    device waits, in later steps nothing happens at all, and ranks whose reductions would not meet learn it before.
    What the number and the shapes of the reductions depend on belongs to the kind. facts: None is the kind itself.
    """
    facts = kind if facts is None else facts
    group = _resolved(name)
    known = _agreed.setdefault(group, _Agreed())
    if kind in known.kinds:
        return
    store, ranks = group.get_group_store(), range(group.size())
    key = f"contextrast_kernels/{known.exchanges}"
    keys = [f"{key}/{rank}" for rank in ranks]
    store.set(keys[group.rank()], facts)
    try:
        store.wait(keys)
    except RuntimeError as error:
        store.delete_key(keys[group.rank()])  # who comes later waits as well, and not in a reduction
        raise RuntimeError(
            f"group: expected all {len(ranks)} ranks to come with {facts}, as rank {group.rank()} did, but some did "
            "not come; call the loss on all ranks, with the same options, backend and kind of features"
        ) from error
    known.exchanges += 1
    first, *others = (store.get(each).decode() for each in keys)
    if store.add(key, 1) == len(ranks):  # all have read; a later group may find itself with this store and name
        for each in (*keys, key):
            store.delete_key(each)
    for rank, given in enumerate(others, 1):
        if given != first:
            pairs = [pair for pair in zip(first.split("; "), given.split("; ")) if pair[0] != pair[1]]
            expected, got = map(", ".join, zip(*pairs))
            raise ValueError(
                f"group: expected the same on all ranks, got {expected} on rank 0 and {got} on rank {rank}; "
                "give the loss the same options, backend and kind of features everywhere"
            )
    known.kinds.add(kind)


# When torch.compile traces, ranks agree once; a compiled step does not ask again.
size._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo reads the mark
agree._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as above


def reduced(x: Tensor, name: str, operation: str = "sum") -> Tensor:
    """The ranks' x added up, or their maximum; the same bits on every rank. No gradient."""
    # Imported here, where torch.distributed is in use anyway.
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(
        collectives.all_reduce(x.detach().contiguous(), operation, name)  # type: ignore[arg-type]  # as above
    )


def gathered(x: Tensor, name: str) -> Tensor:
    """The ranks' x, which are of one shape, one after another along the first axis. No gradient."""
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(
        collectives.all_gather_tensor(x.detach().contiguous(), 0, name)  # type: ignore[arg-type]  # as above
    )


def add_up(parts: Sequence[Tensor], name: str) -> None:
    """Every tensor becomes its sum over the ranks, all in one reduction. They share a dtype."""
    total = reduced(torch.cat([part.flatten() for part in parts]), name)
    for part, of_all in zip(parts, total.split([part.numel() for part in parts])):
        part.copy_(of_all.view_as(part))


def close_enough(bound: float | None) -> bool:
    """Whether sums of exponentials of up to ±bound need no shift: float64 holds exp(±709), and many of them."""
    return bound is not None and bound <= 300


def log_sum_exp(log_sums: Tensor, name: str, bound: float | None = None) -> Tensor:
    """log Σ exp over the ranks, elementwise; -inf where all are, NaN where one is. No gradient.

    bound: no exponent is larger in size. Where it is ``close_enough`` one reduction does; else the largest is asked for
    before.
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
    """``reduced``, where every rank's loss is a share of one sum: the gradients of all ranks add up as well."""

    @staticmethod
    def forward(ctx, x: Tensor, name: str) -> Tensor:
        ctx.group = name
        return reduced(x, name)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        return reduced(gradient, ctx.group), None


class DifferentiableOnce(torch.autograd.Function):
    """x itself. A second derivative would need the other ranks' first ones: it raises, where it would be wrong."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient
