"""The metrics as literal loops over pixels, one class at a time, from their papers; nothing shared with the package.

Every function takes lists of images, (H, W) or (Z, H, W), of true and predicted classes as NumPy arrays. A label
outside 0..N-1 is ignored.
"""

import math

import numpy as np


def mean(values):
    """Mean of the values that are not NaN; NaN if there are none."""
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def ratio(above, below):
    return above / below if below else math.nan


def pixels(labels, N):
    return [pixel for pixel in np.ndindex(labels.shape) if 0 <= labels[pixel] < N]


def iou(labels, predictions, N, counted=None):
    """The IoU of each class over the data set. ``counted`` holds a set of pixels to look at for each image."""
    scores = []
    for n in range(N):
        both = either = 0
        for b, (y, p) in enumerate(zip(labels, predictions)):
            for pixel in pixels(y, N):
                if counted is None or pixel in counted[b]:
                    both += y[pixel] == n and p[pixel] == n
                    either += y[pixel] == n or p[pixel] == n
        scores.append(ratio(both, either))
    return scores


def neighbours(pixel, shape):
    for axis in range(len(shape)):
        for step in (-1, 1):
            other = (*pixel[:axis], pixel[axis] + step, *pixel[axis + 1 :])
            if 0 <= other[axis] < shape[axis]:
                yield other


def contour(classes, valid, n=None):
    """Valid pixels (of class n) with a valid neighbour of another class."""
    found = set()
    for pixel in valid:
        if n is None or classes[pixel] == n:
            others = (q for q in neighbours(pixel, classes.shape) if q in valid)
            if any(classes[q] != classes[pixel] for q in others):
                found.add(pixel)
    return found


def near(pixel, others, radius):
    return any(sum((a - b) ** 2 for a, b in zip(pixel, other)) <= radius**2 for other in others)


def trimap(labels, radius, N):
    valid = set(pixels(labels, N))
    boundary = contour(labels, valid)
    return {pixel for pixel in valid if near(pixel, boundary, radius)}


def erode(mask):
    """One step of erosion by 3 pixels along every axis; the outside of the image is not in the mask."""
    padded = np.pad(mask, 1)
    out = np.zeros_like(mask)
    for pixel in np.ndindex(mask.shape):
        out[pixel] = padded[tuple(slice(i, i + 3) for i in pixel)].all()
    return out


def band(mask, width):
    """The pixels of a mask that ``width`` erosions take away."""
    inner = mask
    for _ in range(width):
        inner = erode(inner)
    return mask & ~inner


def boundary_iou(labels, predictions, N, width):
    """The Boundary IoU of each class over the data set. An ignored pixel erodes no mask and is removed from all."""
    scores = []
    for n in range(N):
        both = either = 0
        for y, p in zip(labels, predictions):
            valid = np.zeros(y.shape, bool)
            for pixel in pixels(y, N):
                valid[pixel] = True
            true, predicted = (band((image == n) | ~valid, width) & valid for image in (y, p))
            both += (true & predicted).sum()
            either += (true | predicted).sum()
        scores.append(ratio(int(both), int(either)))
    return scores


def boundary_f1(labels, predictions, N, radius=None):
    """The F1 of each class: the mean over images with a contour of the class in labels or prediction."""
    scores = []
    for n in range(N):
        of_images = []
        for y, p in zip(labels, predictions):
            reach = 0.0075 * math.hypot(*y.shape) if radius is None else radius
            valid = set(pixels(y, N))
            true, predicted = contour(y, valid, n), contour(p, valid, n)
            if not true and not predicted:
                continue
            precision = sum(near(pixel, true, reach) for pixel in predicted) / max(len(predicted), 1)
            recall = sum(near(pixel, predicted, reach) for pixel in true) / max(len(true), 1)
            of_images.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
        scores.append(mean(of_images))
    return scores


def instance_iou(labels, predictions, instances, sizes, first, categories=None):
    """The instance IoU of each class, or of each category."""
    N = len(sizes)
    groups = [[n] for n in range(N)]
    if categories is not None:
        groups = [[n for n in range(N) if categories[n] == k] for k in range(max(categories) + 1)]
    scores = []
    for group in groups:
        hits = misses = false_alarms = 0.0
        for y, p, ids in zip(labels, predictions, instances):
            valid = pixels(y, N)
            false_alarms += sum(p[pixel] in group and y[pixel] not in group for pixel in valid)
            for n in group:
                for number in {ids[pixel] for pixel in valid if y[pixel] == n and ids[pixel] >= first}:
                    region = [pixel for pixel in valid if y[pixel] == n and ids[pixel] == number]
                    right = sum(p[pixel] in group for pixel in region)
                    weight = (sizes[n] or 0) / len(region)
                    hits += right * weight
                    misses += (len(region) - right) * weight
        scored = group and all(sizes[n] is not None for n in group)
        scores.append(ratio(hits, hits + false_alarms + misses) if scored else math.nan)
    return scores


def distance(v, w):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(v, w)))


def at_unit_length(v):
    length = math.sqrt(sum(a * a for a in v))
    return [a / length for a in v] if length > 1e-12 else [0.0 for _ in v]


def alignment(vectors):
    """The alignment of one class: the mean distance over all pairs, including those of a vector with itself."""
    return sum(distance(v, w) for v in vectors for w in vectors) / len(vectors) ** 2


def uniformity(centres, k=None):
    """Mean distance to the other centres, or to the k nearest of them."""
    k = len(centres) - 1 if k is None else k
    if len(centres) <= k or k < 1:
        return math.nan
    total = 0.0
    for i, centre in enumerate(centres):
        total += sum(sorted(distance(centre, other) for j, other in enumerate(centres) if j != i)[:k]) / k
    return total / len(centres)
