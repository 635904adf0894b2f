"""Inputs for the distance transform of lines, maps and volumes, and brute force over every pair of pixels."""

import itertools

import numpy as np

NO_EDGE = 2**31 - 1
SAMPLINGS = (None, (1.0, 1.0, 2.5), (0.7, 0.7, 3.0), (0.3, 1.7, 0.9), (2.0**-20, 5.0, 3 * 2.0**30), (1e8, 1.0, 1e-7))


def every_map(shape, symbols):
    """All arrays of one shape with values 0..symbols-1."""
    voxels = int(np.prod(shape))
    code = np.arange(symbols**voxels)
    return np.stack([code // symbols**v % symbols for v in range(voxels)], 1).astype(np.int8).reshape(-1, *shape)


def costs(shape, sampling):
    """Squared distance of every two pixels, (pixels, pixels): int64, or float64 in the order of docs/distance.md."""
    place = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, len(shape))
    apart = place[:, None] - place[None]
    if sampling is None:
        return (apart**2).sum(-1)
    total = np.zeros(apart.shape[:2])
    for axis, side in enumerate(sampling):
        total = total + (side * apart[..., axis].astype(np.float64)) ** 2
    return total


def brute_force(sites, sampling):
    """Squared distances of bool (B, ...) to the nearest site, and the number of the first such site (-1 if none)."""
    between = costs(sites.shape[1:], sampling)
    flat = sites.reshape(len(sites), -1)
    far = np.where(flat[:, None, :], between, NO_EDGE if sampling is None else np.inf)
    squared, number = far.min(-1), far.argmin(-1)
    number = np.where(flat.any(1)[:, None], number, -1)
    return squared.reshape(sites.shape), number.reshape(sites.shape)


def coordinates(number, shape):
    """(axes, ...) of pixels' numbers; -1 stays -1. (NumPy's unravel_index is wrong for some shapes of `number`.)"""
    found, rest = [], number
    for size in reversed(shape):
        found.append(np.where(number < 0, -1, rest % size))
        rest = rest // size
    return np.stack(found[::-1])


def numbers(indices, shape):
    """The inverse of ``coordinates``."""
    number = np.zeros(indices.shape[1:], dtype=np.int64)
    for index, size in zip(indices, shape, strict=True):
        number = number * size + index
    return number


def edges(classes):
    """Pixels of a class with a neighbour of another value in the image, pixel by pixel."""
    out = np.zeros(classes.shape, dtype=bool)
    for place in np.ndindex(classes.shape):
        for axis, step in itertools.product(range(1, classes.ndim), (-1, 1)):
            other = list(place)
            other[axis] += step
            if 0 <= other[axis] < classes.shape[axis] and classes[tuple(other)] != classes[place]:
                out[place] = classes[place] >= 0
    return out


def edge_distance(classes, sampling):
    """The squared distances of Eq. 7, class by class."""
    of_edge, between = edges(classes).reshape(len(classes), -1), costs(classes.shape[1:], sampling)
    flat = classes.reshape(len(classes), -1)
    same = flat[:, :, None] == flat[:, None, :]
    far = np.where(of_edge[:, None, :] & same, between, NO_EDGE if sampling is None else np.inf)
    return np.where(flat < 0, -1, far.min(-1)).reshape(classes.shape)


def families(rng, shape):
    """Adversarial bool volumes, True = nonzero: name -> volume."""
    z, y, x = np.mgrid[tuple(slice(n) for n in shape)]
    centre = [n // 2 for n in shape]
    ball = sum((a - c) ** 2 for a, c in zip((z, y, x), centre, strict=True))
    corner, far = np.ones(shape, dtype=bool), np.ones(shape, dtype=bool)
    corner[0, 0, 0] = False
    far[-1, -1, -1] = far[0, -1, 0] = False
    named = {
        "no zero": np.ones(shape, dtype=bool),
        "all zero": np.zeros(shape, dtype=bool),
        "one zero in a corner": corner,
        "two far zeros": far,
        "checkerboard": (z + y + x) % 2 == 0,
        "a plane across": z != centre[0],
        "a plane along": x != centre[2],
        "a slanted plane": z + 2 * y + 3 * x != sum(centre),
        "a sphere": abs(ball - min(shape) ** 2 // 5) > min(shape),
        "a ball": ball <= min(shape) ** 2 // 5,
        "stripes": y % 5 != 0,
        "a parabola": (y - centre[1]) ** 2 != 4 * x + z,
    }
    for percent in (0.1, 1, 10, 50, 90, 99, 99.9):
        named[f"noise, {percent} %"] = rng.random(shape) * 100 < percent
    return named
