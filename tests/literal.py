"""The equations of the Contextrast loss as literal loops, to be read beside docs/method.md.

There is one function per equation. They use Python numbers and NumPy arrays in float64, one pixel at a time; nothing is
vectorised or shared with the package. Feature maps are (B, D, h, w), label maps (B, H, W), class maps (B, H', W'), and
logits (B, N, H', W'). Volumes have an axis z, Z or Z' before these. A size has a number for each spatial axis.
"""

import math

import numpy as np

NO_EDGE = 2**31 - 1  # the squared distance where a class has no edge pixel, or a mask has no zero


# ------------------------------------------------------------------------------------------------------ maps and labels


def resize(image, size):
    """Nearest sampling by exact integers: row r of h takes source row (r H) // h, and so along every axis."""
    axes = len(size)
    full = image.shape[-axes:]
    out = np.empty((*image.shape[:-axes], *size), dtype=image.dtype)
    for at in np.ndindex(*size):
        source = [(at[axis] * full[axis]) // size[axis] for axis in range(axes)]
        out[(..., *at)] = image[(..., *source)]
    return out


def resize_bilinear(logits, size):
    """Bilinear interpolation of (B, N, H, W) between pixel centres (align_corners=False), in float64."""
    B, N, H, W = logits.shape
    h, w = size

    def between(i, size, source_size):
        at = min(max((i + 0.5) * source_size / size - 0.5, 0.0), source_size - 1)
        low = math.floor(at)
        return low, min(low + 1, source_size - 1), at - low

    out = np.empty((B, N, h, w))
    for r in range(h):
        r0, r1, v = between(r, h, H)
        for c in range(w):
            c0, c1, u = between(c, w, W)
            above = (1 - u) * logits[:, :, r0, c0] + u * logits[:, :, r0, c1]
            below = (1 - u) * logits[:, :, r1, c0] + u * logits[:, :, r1, c1]
            out[:, :, r, c] = (1 - v) * above + v * below
    return out


def predicted_classes(predictions):
    """A class map as it is. For logits the channel of the largest value, the lowest of equal ones."""
    if predictions.ndim == 3 or predictions.dtype.kind in "iu":
        return predictions
    B, N, *size = predictions.shape
    classes = np.empty((B, *size), dtype=np.int64)
    for b, *at in np.ndindex(B, *size):
        best = 0
        for n in range(1, N):
            if predictions[(b, n, *at)] > predictions[(b, best, *at)]:
                best = n
        classes[(b, *at)] = best
    return classes


def pixels(size):
    """Where the pixels of one image are, in memory order."""
    return list(np.ndindex(*size))


def number(at, size):
    """p: a pixel's place in memory order inside its image; row * w + column of a map."""
    p = 0
    for index, length in zip(at, size, strict=True):
        p = p * length + index
    return p


def is_class(value, num_classes):
    value = int(value)
    return value >= 0 and (num_classes is None or value < num_classes)


def is_valid(label, num_classes, ignore_index):
    return int(label) != ignore_index and is_class(label, num_classes)


# ------------------------------------------------------------------------------------------------------------ the hash


def mix(x):
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) % 2**32
    x = ((x ^ (x >> 12)) * 0x297A2D39) % 2**32
    return x ^ (x >> 15)


def hash32(seed, stream, p):
    """Unsigned 32-bit hash of pixel number p inside its image."""
    lo = seed % 2**32
    hi = (seed // 2**32) % 2**32
    key = mix(mix(mix((stream + 0x9E3779B9) % 2**32) ^ hi) ^ lo)
    return mix((p % 2**32) ^ key)


# ------------------------------------------------------------------------------------------------------- anchors, Eq. 1


def embedding(x, normalize=True):
    """v = x / |x|; 0 where |x| <= 1e-12; a NaN stays a NaN."""
    x = [float(value) for value in x]
    if not normalize:
        return x
    length = math.sqrt(math.fsum(value * value for value in x))
    if length <= 1e-12:
        return [0.0] * len(x)
    return [value / length for value in x]


def class_anchors(features, labels, num_classes, ignore_index=255, normalize=True):
    """Eq. 1: the mean embedding of all valid pixels of the batch with label n, and their number."""
    B, D, *size = features.shape
    y = resize(labels, size)
    sums, counts = np.zeros((num_classes, D)), np.zeros(num_classes, dtype=np.int64)
    for b in range(B):
        for at in pixels(size):
            if is_valid(y[(b, *at)], num_classes, ignore_index):
                n = int(y[(b, *at)])
                sums[n] += embedding(features[(b, slice(None), *at)], normalize)
                counts[n] += 1
    anchors = np.zeros((num_classes, D))
    for n in range(num_classes):
        if counts[n] > 0:
            anchors[n] = sums[n] / counts[n]
    return anchors, counts


def fuse_anchors(anchors, counts, top_anchors, top_counts, weight=0.7):
    """w_l a + w_h a_I; a class missing from the top layer keeps a, a class missing here has none."""
    fused = np.zeros_like(anchors)
    for n in range(len(anchors)):
        if counts[n] > 0 and top_counts[n] > 0:
            fused[n] = (1 - weight) * anchors[n] + weight * top_anchors[n]
        elif counts[n] > 0:
            fused[n] = anchors[n]
    return fused


# ------------------------------------------------------------------------------------------------------- BANE, Eqs. 6-7


def error_map(predictions, labels, num_classes=None, ignore_index=255):
    """Eq. 6: the wrongly predicted class, or -1; predictions are brought to the labels' size."""
    if num_classes is None and predictions.ndim == labels.ndim + 1:
        num_classes = predictions.shape[1]
    p = resize(predicted_classes(predictions), labels.shape[1:])
    e = np.full(labels.shape, -1, dtype=np.int64)
    for at in np.ndindex(labels.shape):
        if (
            is_valid(labels[at], num_classes, ignore_index)
            and is_valid(p[at], num_classes, ignore_index)
            and int(p[at]) != int(labels[at])
        ):
            e[at] = int(p[at])
    return e


def neighbours(at, size):
    """The pixels one step away along one axis, inside the image: up to 4 in a map, 6 in a volume."""
    found = []
    for axis in range(len(size)):
        for step in (-1, 1):
            index = at[axis] + step
            if 0 <= index < size[axis]:
                found.append((*at[:axis], index, *at[axis + 1 :]))
    return found


def edge_pixels(classes):
    """Pixels of a class with a neighbour inside the image that is not in that class; classes is one image."""
    edge = np.zeros(classes.shape, dtype=bool)
    for at in pixels(classes.shape):
        if classes[at] >= 0:
            edge[at] = any(classes[other] != classes[at] for other in neighbours(at, classes.shape))
    return edge


def distance_sq(p, q, sampling=None):
    """Squared distance of two pixels; with sampling ((s_z dz)² + (s_y dy)²) + (s_x dx)², rounded at every step."""
    if sampling is None:
        return sum((a - b) ** 2 for a, b in zip(p, q, strict=True))
    total = 0.0
    for a, b, s in zip(p, q, sampling, strict=True):
        total = total + (s * (a - b)) * (s * (a - b))
    return total


def edge_distance_sq(classes, sampling=None):
    """Eq. 7, squared: to the nearest edge pixel of the pixel's own class; -1 outside, NO_EDGE (with sampling inf)
    without an edge."""
    B, *size = classes.shape
    squared = np.full((B, *size), -1, dtype=np.int64 if sampling is None else np.float64)
    for b in range(B):
        edge = edge_pixels(classes[b])
        edges_of = {}
        for at in pixels(size):
            if edge[at]:
                edges_of.setdefault(int(classes[(b, *at)]), []).append(at)
        for at in pixels(size):
            if classes[(b, *at)] >= 0:
                nearest = NO_EDGE if sampling is None else math.inf
                for other in edges_of.get(int(classes[(b, *at)]), []):
                    nearest = min(nearest, distance_sq(at, other, sampling))
                squared[(b, *at)] = nearest
    return squared


def distance_transform_sq(mask):
    """SciPy's meaning, squared: from every nonzero pixel of one image to the nearest zero; NO_EDGE without one."""
    H, W = mask.shape
    zeros = [(r, c) for r in range(H) for c in range(W) if mask[r, c] == 0]
    squared = np.zeros((H, W), dtype=np.int64)
    for r in range(H):
        for c in range(W):
            if mask[r, c] != 0:
                squared[r, c] = min([(r - i) ** 2 + (c - j) ** 2 for i, j in zeros], default=NO_EDGE)
    return squared


def select_nearest(classes, distance_sq, ratio, num_classes=None, seed=0):
    """Per image and class the ceil(ratio |B^n|) pixels that come first in order of (squared distance, hash)."""
    B, *size = classes.shape
    selected = np.zeros((B, *size), dtype=bool)
    for b in range(B):
        members = {}
        for at in pixels(size):
            n = classes[(b, *at)]
            if is_class(n, num_classes):
                rank = (distance_sq[(b, *at)].item(), hash32(seed, 0, number(at, size)))
                members.setdefault(int(n), []).append((rank, at))
        for of_class in members.values():
            k = math.ceil(ratio * len(of_class))
            for _, at in sorted(of_class)[:k]:
                selected[(b, *at)] = True
    return selected


def bane_negatives(
    predictions,
    labels,
    num_classes=None,
    size=None,
    ratio=0.5,
    negatives="bane",
    distance_at="layer",
    ignore_index=255,
    seed=0,
    sampling=None,
):
    """The class each pixel of the layer is a hard negative of, or -1. sampling: the size of a pixel of the labels, of
    which a pixel of the layer covers H / h along each axis."""
    if num_classes is None and predictions.ndim == labels.ndim + 1:
        num_classes = predictions.shape[1]
    size = labels.shape[1:] if size is None else size
    if distance_at == "layer":
        e = error_map(resize(predicted_classes(predictions), size), resize(labels, size), num_classes, ignore_index)
        if sampling is not None:
            sampling = [s * (H / h) for s, H, h in zip(sampling, labels.shape[1:], size, strict=True)]
        squared = edge_distance_sq(e, sampling)
    else:
        full = error_map(predictions, labels, num_classes, ignore_index)
        e, squared = resize(full, size), resize(edge_distance_sq(full, sampling), size)
    if negatives == "none":
        return np.full_like(e, -1)
    if negatives == "semi-hard":
        squared = np.zeros_like(squared)
    return np.where(select_nearest(e, squared, ratio, num_classes, seed), e, -1)


def base_pixels(size, base_rate, stream, seed=0):
    """Where hash(seed, 1 + i, p) < base_rate 2^32; the same in every image. stream is 1 + i."""
    base = np.zeros(size, dtype=bool)
    for at in pixels(size):
        base[at] = hash32(seed, stream, number(at, size)) < base_rate * 2.0**32
    return base


# ----------------------------------------------------------------------------------------------------- losses, Eqs. 3-4


def softplus(z):
    """log(1 + e^z), also for z = -inf."""
    return z + math.log1p(math.exp(-z)) if z > 0 else math.log1p(math.exp(z))


def logsumexp(values):
    """log Σ e^v; -inf for an empty list."""
    top = max(values, default=-math.inf)
    if top == -math.inf:
        return -math.inf
    return top + math.log(math.fsum(math.exp(value - top) for value in values))


def dot(a, b):
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def pixel_anchor_loss(
    features, labels, anchors, negatives=None, base=None, temperature=0.1, ignore_index=255, normalize=True
):
    """Eqs. 3-4: mean over present classes n, mean over pixels p of n, of softplus(Z_n - s_np)."""
    B, _, *size = features.shape
    N = len(anchors)
    y = resize(labels, size)
    if negatives is None and base is None:
        base = np.ones((B, *size), dtype=bool)
    valid = [(b, *at) for b in range(B) for at in pixels(size) if is_valid(y[(b, *at)], N, ignore_index)]
    vectors = {(b, *at): features[(b, slice(None), *at)] for b, *at in valid}
    if not all(np.isfinite(x).all() for x in vectors.values()):
        return math.nan

    def similarity(n, pixel):
        return dot(anchors[n], embedding(vectors[pixel], normalize)) / temperature

    def is_negative(n, pixel):
        chosen = negatives is not None and int(negatives[pixel]) == n
        other = base is not None and bool(base[pixel]) and int(y[pixel]) != n
        return chosen or other

    terms = []
    for n in range(N):
        positives = [pixel for pixel in valid if int(y[pixel]) == n]
        if positives:
            Z = logsumexp([similarity(n, pixel) for pixel in valid if is_negative(n, pixel)])
            terms.append(math.fsum(softplus(Z - similarity(n, pixel)) for pixel in positives) / len(positives))
    return math.fsum(terms) / len(terms) if terms else 0.0


def layer_anchors(
    features, labels, num_classes, ignore_index=255, fusion_weight=0.7, normalize=True, normalize_anchors=False
):
    """The anchors each layer's loss uses: Eq. 1, fused with the last layer's, normalised if asked."""
    top, top_counts = class_anchors(features[-1], labels, num_classes, ignore_index, normalize)
    fused = []
    for x in features[:-1]:
        anchors, counts = class_anchors(x, labels, num_classes, ignore_index, normalize)
        fused.append(fuse_anchors(anchors, counts, top, top_counts, fusion_weight))
    fused.append(top)
    if normalize_anchors:
        fused = [np.array([embedding(row) for row in anchors]).reshape(anchors.shape) for anchors in fused]
    return fused


def contextrast_layer_losses(
    features,
    labels,
    predictions,
    num_classes,
    ignore_index=255,
    temperature=0.1,
    fusion_weight=0.7,
    negatives="bane",
    ratio=0.5,
    base_rate=0.0,
    distance_at="layer",
    normalize=True,
    normalize_anchors=False,
    seed=0,
    anchors=None,
    sampling=None,
):
    """L_i of every layer. anchors: given rows instead of the batch's own, which is what a stopped gradient sees."""
    if anchors is None:
        anchors = layer_anchors(
            features, labels, num_classes, ignore_index, fusion_weight, normalize, normalize_anchors
        )
    losses = []
    for i, x in enumerate(features):
        B, _, *size = x.shape
        chosen = bane_negatives(
            predictions, labels, num_classes, size, ratio, negatives, distance_at, ignore_index, seed, sampling
        )
        base = np.array([base_pixels(size, base_rate, 1 + i, seed)] * B).reshape(B, *size)
        losses.append(pixel_anchor_loss(x, labels, anchors[i], chosen, base, temperature, ignore_index, normalize))
    return losses


def contextrast_loss(features, labels, predictions, num_classes, layer_weights=(1.0, 0.7, 0.4, 0.1), **options):
    """L_PA: the sum over layers of lambda_i L_i."""
    losses = contextrast_layer_losses(features, labels, predictions, num_classes, **options)
    return math.fsum(weight * loss for weight, loss in zip(layer_weights, losses, strict=True))


def info_nce(
    rows,
    row_labels,
    columns=None,
    column_labels=None,
    temperature=0.1,
    ignore_index=-1,
    positives="each",
    row_negatives=None,
    column_negatives=None,
    column_weights=None,
    reduction="mean",
):
    """Mean over rows with a valid label (or the list, 0 where there is none) of the mean over positives j of

    -log e^s_ij / (e^s_ij + Σ_negatives e^s)      "each"
    -log e^s_ij / (Σ_positives and negatives e^s) "supcon"

    or, "pooled", of -log Σ_positives e^s / (Σ_positives e^s + Σ_negatives e^s). Column j counts w_j times.
    """
    own = columns is None
    if own:
        columns, column_labels = rows, row_labels
    named = row_negatives is not None or column_negatives is not None
    if named:
        row_negatives = row_labels if row_negatives is None else row_negatives
        column_negatives = column_labels if column_negatives is None else column_negatives
    terms, valid = [], 0
    for i in range(len(rows)):
        terms.append(0.0)
        if int(row_labels[i]) == ignore_index:
            continue
        valid += 1
        # Each column as (log weight + s, s, weight).
        positive, negative, either = [], [], []
        for j in range(len(columns)):
            w = 1.0 if column_weights is None else float(column_weights[j])
            if int(column_labels[j]) == ignore_index or (own and i == j) or w == 0:
                continue
            s = dot(rows[i], columns[j]) / temperature
            same = int(column_labels[j]) == int(row_labels[i])
            against = not same
            if named:
                against = int(column_negatives[j]) == int(row_negatives[i]) != ignore_index
            item = (math.log(w) + s, s, w)
            positive += [item] * same
            negative += [item] * against
            either += [item] * (same or against)
        if not positive:
            continue
        mass = math.fsum(w for _, _, w in positive)
        Z, Y, A = (logsumexp([logit for logit, _, _ in items]) for items in (negative, positive, either))
        terms[-1] = {
            "each": math.fsum(w * softplus(Z - s) for _, s, w in positive) / mass,
            "supcon": math.fsum(w * (A - s) for _, s, w in positive) / mass,
            "pooled": softplus(Z - Y),
        }[positives]
    if reduction == "none":
        return terms
    return math.fsum(terms) / valid if valid else 0.0
