"""The exact Euclidean distance transform, and the distance to the edge of a pixel's own region.

    d(p) = min_{q ∈ S} sqrt(((s_z Δz)² + (s_y Δy)²) + (s_x Δx)²)

S are the zeros of a mask (``distance_transform``), or the edge pixels of p's class (``edge_distance``, Eq. 7). An edge
pixel has a neighbour inside the image that is not in its class. The nearest edge pixel of *any* class is always one of
p's own class: on every monotone path from p to another region, the last pixel inside the class is an edge pixel of that
class and nearer. So one binary transform serves all classes.

Without sampling, squared distances are integers. With it they are float64, and every operation above is rounded.
Rounding keeps the order of numbers, so the minimum can be taken axis by axis and is still the minimum over all of S.
"""

import math
import numbers
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from contextrast_kernels import checks, native
from contextrast_kernels.backend import choose

NO_EDGE = torch.iinfo(torch.int32).max
"""The squared distance, in int32, of pixels in an image without a zero or an edge."""

_SMALLEST_SIDE, _LARGEST_SIDE = 1e-100, 1e100
_UNSIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *_UNSIGNED)
_NATIVE = (torch.bool, *_INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64)


_Sampling = float | tuple[float, ...] | None


@overload
def distance_transform(
    mask: Tensor,
    *,
    spatial_dims: int = ...,
    sampling: _Sampling = ...,
    squared: bool = ...,
    return_indices: Literal[False] = ...,
) -> Tensor: ...
@overload
def distance_transform(
    mask: Tensor,
    *,
    spatial_dims: int = ...,
    sampling: _Sampling = ...,
    squared: bool = ...,
    return_indices: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def distance_transform(
    mask: Tensor, *, spatial_dims: int = ..., sampling: _Sampling = ..., squared: bool = ..., return_indices: bool
) -> Tensor | tuple[Tensor, Tensor]: ...


@checks.takes_subclasses
def distance_transform(
    mask: Tensor,
    *,
    spatial_dims: int = 2,
    sampling: float | tuple[float, ...] | None = None,
    squared: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The exact Euclidean distance of every nonzero pixel to the nearest zero of its image, as in SciPy, but batched.

    Args:
        mask: (..., W), (..., H, W) or (..., Z, H, W), of any real dtype; every leading axis is a batch axis. NaN is
            nonzero.
        spatial_dims: 1, 2 or 3, the number of last axes that make an image.
        sampling: the size of a pixel along each spatial axis, or one number for all. None: 1, in exact integers.
        squared: return squared distances.
        return_indices: return the nearest zero of every pixel too.

    Returns:
        Distances of the mask's shape in float32, or squared in int32 (float64 with sampling). Zeros have 0. In an image
        without a zero all are inf, or the largest int32. With return_indices a pair: the distances, and int32
        (spatial_dims, *mask.shape), the coordinates of the nearest zero, -1 if there is none. Of several nearest zeros
        it is the first in memory order; in volumes whose sampling has rounded squares it may be a different one.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size or range; the error names it.
        RuntimeError: the requested backend cannot run.
    """
    checks.tensor("mask", mask, "a mask (..., H, W)")
    checks.integer("spatial_dims", spatial_dims, low=1, high=3)
    if mask.is_complex():
        raise TypeError(f"mask: expected a real dtype, got {checks.describe(mask)}. Pass mask != 0.")
    if mask.ndim < spatial_dims:
        raise ValueError(
            f"mask: expected at least {spatial_dims} axes (spatial_dims), got {checks.describe(mask)}. "
            "Lower spatial_dims."
        )
    checks.sides("mask", mask, spatial_dims)
    sampling = check_sampling(sampling, spatial_dims)
    checks.flag("squared", squared)
    checks.flag("return_indices", return_indices)
    if mask.dtype not in _NATIVE:
        mask = mask.float()
    batched = mask[None] if mask.ndim == spatial_dims else mask.flatten(0, -spatial_dims - 1)
    if choose(mask, ("native",)) == "native":
        op = native.nearest_zero if return_indices else native.distance_transform
        result = op(batched, squared, sampling)
        distance, indices = result if return_indices else (result, None)
    else:
        sites = (batched.to(_UNSIGNED[mask.dtype]) if mask.dtype in _UNSIGNED else batched) == 0
        distance_sq, nearest = _transform(sites, sampling, return_indices)
        distance = _in_pixels(distance_sq, squared, sampling)
        indices = _coordinates(nearest, sites.shape[1:]) if nearest is not None else None
    distance = distance.reshape(mask.shape)
    return (distance, indices.reshape(spatial_dims, *mask.shape)) if indices is not None else distance


@checks.takes_subclasses
def edge_distance(
    classes: Tensor, *, sampling: float | tuple[float, ...] | None = None, squared: bool = False
) -> Tensor:
    """The exact distance of every pixel to the nearest edge pixel of its own class in its image (Eq. 7).

    An edge pixel has a neighbour inside the image with a different value, one of 4 in a map or of 6 in a volume.

    Args:
        classes: (B, H, W), (B, 1, H, W) or (B, Z, H, W) integers, negative = no class, as ``error_map`` returns
            them. (B, 1, H, W) is a map, or a volume of depth one if ``sampling`` has three numbers.
        sampling: the size of a pixel along each spatial axis, or one number for all. None: 1, in exact integers.
        squared: return squared distances.

    Returns:
        float32 (B, H, W) of maps, also of (B, 1, H, W), or (B, Z, H, W) of volumes; or squared in int32 (float64 with
        sampling). Edge pixels have 0, pixels without a class -1. A class that fills its whole image has no edge: inf,
        or the largest int32.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size or range; the error names it.
        RuntimeError: the requested backend cannot run.
    """
    expected = "integers (B, H, W) or (B, Z, H, W)"
    checks.tensor("classes", classes, expected)
    if classes.dtype not in _INTEGERS:
        raise TypeError(f"classes: expected {expected}, got {checks.describe(classes)}. Call .long().")
    if classes.ndim not in (3, 4):
        hint = "Add the batch axis, classes[None]." if classes.ndim == 2 else "Reshape it."
        raise ValueError(f"classes: expected {expected}, got {checks.describe(classes)}. {hint}")
    of_volume = isinstance(sampling, tuple | list) and len(sampling) == 3
    if classes.ndim == 4 and classes.shape[1] == 1 and not of_volume:
        classes = classes[:, 0]
    spatial_dims = classes.ndim - 1
    checks.sides("classes", classes, spatial_dims)
    sampling = check_sampling(sampling, spatial_dims)
    checks.flag("squared", squared)
    if choose(classes, ("native",)) == "native":
        return native.edge_distance(classes, squared, sampling)
    values = classes.long()
    inside = torch.ones_like(values, dtype=torch.bool) if classes.dtype in _UNSIGNED else values >= 0
    distance_sq, _ = _transform(_edges(values) & inside, sampling, False)
    return _in_pixels(torch.where(inside, distance_sq, -1), squared, sampling)


def check_sampling(value, spatial_dims: int) -> tuple[float, ...] | None:
    if value is None:
        return None
    if isinstance(value, numbers.Real):
        value = (value,) * spatial_dims
    elif isinstance(value, str) or not hasattr(value, "__iter__"):
        raise TypeError(
            f"sampling: expected a number or one for each spatial axis, got {checks.describe(value)}. "
            "Pass a number or a tuple of numbers."
        )
    value = tuple(value)
    if len(value) != spatial_dims:
        raise ValueError(
            f"sampling: expected a number or {spatial_dims} numbers, one for each spatial axis, got {len(value)}. "
            "Pass the side of a pixel along each axis."
        )
    # A NumPy scalar of 32 bits cannot be compared with the limits.
    value = tuple(
        float(side) if isinstance(side, numbers.Real) and not isinstance(side, bool) else side for side in value
    )
    for side in value:
        checks.real("sampling", side, low=_SMALLEST_SIDE, high=_LARGEST_SIDE)
    return value


# ------------------------------------------------------------------------------------------------------------ reference


def _edges(classes: Tensor) -> Tensor:
    """Pixels with a neighbour inside the image that has a different value: bool, for any number of spatial axes."""
    edges = torch.zeros_like(classes, dtype=torch.bool)
    for axis in range(1, classes.ndim):
        size = classes.shape[axis]
        place = torch.arange(size, device=classes.device)
        for step in (-1, 1):  # not F.pad, for which Inductor writes invalid C++ on AVX2
            neighbour = classes.index_select(axis, (place + step).clamp(0, size - 1))
            edges = edges | (neighbour != classes)
    return edges


_UNREACHED = 2**30
"""Above every squared distance in integers, and far from overflow."""


def _transform(sites: Tensor, sampling: tuple[float, ...] | None, with_nearest: bool) -> tuple[Tensor, Tensor | None]:
    """The squared distance of every pixel to the nearest site of its image, and that site's index in the image.

    sites is bool (B, ...). Distances are int64 with NO_EDGE, or float64 with inf, in an image without sites; places
    are int64 and -1 there. Separable: one axis after the other, from the first.
    """
    shape, axes = sites.shape, sites.ndim - 1
    none = _UNREACHED if sampling is None else torch.inf
    places = None
    if with_nearest:
        places = torch.arange(math.prod(shape[1:]), device=sites.device).reshape(1, *shape[1:]).expand(shape)
    if sites.numel() == 0:
        return sites.to(torch.int64 if sampling is None else torch.float64), places

    # Along the first axis: the nearest site above or below, above if both are equally near.
    length = shape[1]
    row = torch.arange(length, device=sites.device).reshape(-1, *[1] * (axes - 1))
    above = torch.where(sites, row, -_UNREACHED).cummax(1).values
    below = torch.where(sites, row, _UNREACHED).flip(1).cummin(1).values.flip(1)
    nearest = torch.where(row - above <= below - row, above, below)
    steps = (row - nearest).abs()
    costs = torch.where(steps < length, _apart(steps, sampling, 0), none)
    if places is not None:
        places = places + (nearest - row).clamp(-length, length) * math.prod(shape[2:])

    for axis in range(1, axes):
        largest = 0.0 if sampling is None else sum((sampling[a] * shape[a + 1]) ** 2 for a in range(axes))
        # The margin of the Monge inequality is 2 side² or more, which rounded costs must not hide.
        is_monotone = sampling is None or sampling[axis] ** 2 >= math.ldexp(largest, -50)
        lines: list[Any] = [x if x is None else x.movedim(axis + 1, -1) for x in (costs, places)]
        flat: Any = [x if x is None else x.reshape(-1, shape[axis + 1]) for x in lines]
        flat = (_lower_envelope if is_monotone else _least_of_all)(
            flat[0], flat[1], lambda steps, a=axis: _apart(steps, sampling, a)
        )
        back: list[Any] = [
            x if x is None else x.reshape(line.shape).movedim(-1, axis + 1) for x, line in zip(flat, lines, strict=True)
        ]
        costs, places = back
    if places is not None:
        places = torch.where(costs < none, places, -1)
    return torch.where(costs < none, costs, NO_EDGE if sampling is None else torch.inf), places


def _apart(steps: Tensor, sampling: tuple[float, ...] | None, axis: int) -> Tensor:
    """The squared distance of pixels that are ``steps`` apart along an axis."""
    lengths = steps if sampling is None else steps.double() * sampling[axis]
    return lengths * lengths


def _lower_envelope(costs: Tensor, places: Tensor | None, apart) -> tuple[Tensor, Tensor | None]:
    """min_u costs(u) + apart(x - u) for every x, along the rows of (R, W), and the least places(u) of all minima u.

    The leftmost arg-min u*(x) does not decrease with x, so it is found by divide and conquer: with u* known at every
    2h-th x, the x half-way between two of them need only look between their arg-mins. One level's ranges touch at
    their ends, so laid end to end they fill exactly W - 1 + (number of ranges) places whatever the data: a static
    shape. Every u that is as good as u*(x) is within the range too.
    """
    rows, width = costs.shape
    device = costs.device
    # Padded to a power of two, all that follows has the same shape for many widths: one graph for torch.compile.
    padded = 1
    while padded < width:
        padded *= 2
    none = _UNREACHED if costs.dtype == torch.int64 else torch.inf
    costs = F.pad(costs, (0, padded - width), value=none)
    places = None if places is None else F.pad(places, (0, padded - width), value=0)
    leftmost = torch.zeros_like(costs, dtype=torch.int64)
    least = torch.zeros_like(costs)
    first = None if places is None else torch.zeros_like(places)
    h = padded
    while h >= 1:
        # This level answers x = h-1, 3h-1, 5h-1, ...; x = 2h-1, 4h-1, ... are known and bound the ranges.
        known = leftmost[:, 2 * h - 1 :: 2 * h]
        bounds = torch.cat([known.new_zeros(rows, 1), known, known.new_full((rows, 1), padded - 1)], dim=1)
        ranges = padded // (2 * h) + 1
        starts = bounds[:, 1:-1] + torch.arange(1, ranges, device=device)
        place = torch.zeros(rows, padded - 1 + ranges, dtype=torch.int64, device=device)
        in_range = place.scatter(1, starts, 1).cumsum(1)
        u = torch.arange(padded - 1 + ranges, device=device) - in_range
        x = (2 * in_range + 1) * h - 1
        candidates = costs.gather(1, u) + apart(x - u)
        best = _least_by(in_range, candidates, ranges)
        ties = candidates == best.gather(1, in_range)
        answers = slice(h - 1, None, 2 * h)
        count = leftmost[:, answers].shape[1]
        leftmost[:, answers] = _least_by(in_range, torch.where(ties, u, padded), ranges)[:, :count]
        least[:, answers] = best[:, :count]
        if places is not None and first is not None:
            tied = torch.where(ties, places.gather(1, u), torch.iinfo(torch.int64).max)
            first[:, answers] = _least_by(in_range, tied, ranges)[:, :count]
        h //= 2
    return least[:, :width], None if first is None else first[:, :width]


def _least_by(group: Tensor, values: Tensor, groups: int) -> Tensor:
    """The least value of each group along each row."""
    most = torch.inf if values.is_floating_point() else torch.iinfo(values.dtype).max
    start = torch.full((values.shape[0], groups), most, dtype=values.dtype, device=values.device)
    return start.scatter_reduce(1, group, values, "amin")


def _least_of_all(costs: Tensor, places: Tensor | None, apart) -> tuple[Tensor, Tensor | None]:
    """``_lower_envelope`` by brute force, for pixels so elongated that rounding hides which u is best."""
    x = torch.arange(costs.shape[1], device=costs.device)
    least = torch.full_like(costs, torch.inf)
    first = None if places is None else torch.full_like(places, torch.iinfo(torch.int64).max)
    for u in range(costs.shape[1]):
        candidate = costs[:, u, None] + apart(x - u)
        if places is not None and first is not None:
            number = places[:, u, None]
            tied = (candidate == least) & (number < first)
            first = torch.where((candidate < least) | tied, number, first)
        least = torch.minimum(least, candidate)
    return least, first


def _coordinates(places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The coordinates int32 (axes, B, ...) of pixel indices; -1 stays -1."""
    axes, rest = [], places
    for size in reversed(shape):
        axes.append(torch.where(places < 0, -1, rest % max(size, 1)))
        rest = rest // max(size, 1)
    return torch.stack(axes[::-1]).int()


def _in_pixels(distance_sq: Tensor, squared: bool, sampling: tuple[float, ...] | None) -> Tensor:
    """Squared distances, or their roots in float32, rounded once. A root of NO_EDGE is inf, and -1 stays -1."""
    if squared:
        return distance_sq if sampling is not None else distance_sq.int()
    if sampling is None:
        distance_sq = torch.where(distance_sq == NO_EDGE, torch.inf, distance_sq.double())
    return torch.where(distance_sq < 0, -1.0, distance_sq.abs().sqrt()).float()
