"""The relatives' samplers and losses as literal loops: Python numbers, one pixel at a time, nothing from the package.

Label maps are (B, h, w) of one layer, -1 = no part; feature maps (B, D, h, w); logits (B, N, h, w).
"""

import math

import numpy as np
from literal import dot, edge_distance_sq, embedding, hash32, info_nce, logsumexp, softplus


def pixels_of(labels):
    B, h, w = labels.shape
    return [(b, r, c) for b in range(B) for r in range(h) for c in range(w)]


def by_hash(pixels, width, seed, stream):
    return sorted(pixels, key=lambda pixel: hash32(seed, stream, pixel[1] * width + pixel[2]))


def pairs_of(labels, num_classes):
    """The pixels of every (image, class), by hash later; pairs without pixels are left out."""
    pairs = {}
    for b, r, c in pixels_of(labels):
        if labels[b, r, c] >= 0:
            pairs.setdefault((b, int(labels[b, r, c])), []).append((b, r, c))
    return pairs


def sample(kind, labels, predictions, num_classes, seed, stream, max_samples, max_views, min_pixels):
    """The set of chosen pixels, following the rules word by word."""
    B, _, w = labels.shape
    pairs = pairs_of(labels, num_classes)
    chosen = []
    if kind == "uniform":
        for b in range(B):
            image = [p for p in pixels_of(labels) if p[0] == b and labels[p] >= 0]
            chosen += by_hash(image, w, seed, stream)[: max(1, max_samples // B)]
        return set(chosen)
    kept = {pair: pixels for pair, pixels in pairs.items() if len(pixels) >= min_pixels}
    if not kept:
        return set()
    views = min(max(max_samples // len(kept), 1), max_views)
    if kind == "common-count":
        views = min(views, min(len(pixels) for pixels in kept.values()))
        for pixels in kept.values():
            chosen += by_hash(pixels, w, seed, stream)[:views]
        return set(chosen)
    if kind == "bane":
        errors = np.full_like(labels, -1)
        for p in pixels_of(labels):
            if labels[p] >= 0 and labels[p] != predictions[p] and 0 <= predictions[p] < num_classes:
                errors[p] = predictions[p]
        distance = edge_distance_sq(errors)
    for pixels in kept.values():
        ordered = by_hash(pixels, w, seed, stream)
        hard = [p for p in ordered if predictions[p] != labels[p]]
        easy = [p for p in ordered if predictions[p] == labels[p]]
        if kind == "bane":
            hard.sort(key=lambda p: distance[p] if errors[p] >= 0 else math.inf)  # stable: ties stay in hash order
        half = views / 2
        if len(hard) >= half and len(easy) >= half:
            take_hard = views // 2
            take_easy = views - take_hard
        elif len(hard) >= half:
            take_easy = len(easy)
            take_hard = views - take_easy
        elif len(easy) >= half:
            take_hard = len(hard)
            take_easy = views - take_hard
        else:  # fewer pixels than views: all of them
            take_hard, take_easy = len(hard), len(easy)
        chosen += hard[:take_hard] + easy[:take_easy]
    return set(chosen)


def rows_of(features, labels, chosen, normalize=True):
    """Embeddings and labels of the chosen pixels."""
    return (
        [embedding(features[b, :, r, c], normalize) for b, r, c in sorted(chosen)],
        [int(labels[p]) for p in sorted(chosen)],
    )


def region_centres(features, labels, num_classes, normalize):
    """Unit mean embedding of every class of every image that has it, and their classes."""
    centres, classes = [], []
    for (_, n), pixels in sorted(pairs_of(labels, num_classes).items()):
        vectors = [embedding(features[b, :, r, c], normalize) for b, r, c in pixels]
        mean = [math.fsum(v[d] for v in vectors) / len(vectors) for d in range(features.shape[1])]
        centres.append(embedding(np.array(mean), True))
        classes.append(n)
    return centres, classes


def mined(similarities, hardest, draw, seed, stream, row, most):
    """The `draw` entries of smallest hash among the hardest share, rounded up. The list is sorted, hardest first."""
    share = similarities[: math.ceil(len(similarities) * hardest)]
    keyed = sorted(range(len(share)), key=lambda j: hash32(seed, stream, row * most + j))
    return [share[j] for j in keyed[:draw]] if draw < most else share


def semi_hard_nce(rows, row_labels, columns, column_labels, temperature, hardest, positives, negatives, seed):
    own = columns is None
    if own:
        columns, column_labels = rows, row_labels
    most, total, valid = math.ceil(hardest * len(columns)), 0.0, 0
    for i, label in enumerate(row_labels):
        if label < 0:
            continue
        valid += 1
        s = [dot(rows[i], z) / temperature for z in columns]
        use = [j for j in range(len(columns)) if column_labels[j] >= 0 and not (own and i == j)]
        negative = sorted((s[j] for j in use if column_labels[j] != label), reverse=True)
        positive = sorted(s[j] for j in use if column_labels[j] == label)
        negative = mined(negative, hardest, negatives, seed, 2002, i, most)
        positive = mined(positive, hardest, positives, seed, 2001, i, most)
        if positive and negative:
            Z = logsumexp(negative)
            total += math.fsum(softplus(Z - p) for p in positive) / len(positive)
    return total / valid if valid else 0.0


def multi_scale(layers, label_maps, weights, cross, temperature, seed, max_samples, max_views, min_pixels, num_classes):
    scales = []
    for i, (x, y) in enumerate(zip(layers, label_maps, strict=True)):
        chosen = sample("common-count", y, y, num_classes, seed, 1000 + i, max_samples, max_views, min_pixels)
        scales.append(rows_of(x, y, chosen))
    total = sum(w * info_nce(*scale, temperature=temperature) for w, scale in zip(weights, scales, strict=True))
    total += cross[0] * info_nce(*scales[0], *scales[-1], temperature=temperature)
    return total + cross[1] * info_nce(*scales[0], *scales[-2], temperature=temperature)


def pne(features, labels, logits, temperature, set_size, max_hard, seed=None):
    """With a seed the sets are in hash order (stream 2003), without one in raster order."""
    B, N, w = len(labels), logits.shape[1], labels.shape[2]
    predictions = logits.argmax(1)
    exp = np.exp(logits - logits.max(1, keepdims=True))
    confidence = (exp / exp.sum(1, keepdims=True)).max(1)

    def vector(p):
        return embedding(features[p[0], :, p[1], p[2]], True)

    def full(pixels):
        """S pixels: the given ones, repeated in their order."""
        if seed is not None:
            pixels = by_hash(pixels, w, seed, 2003)
        return [pixels[t % len(pixels)] for t in range(set_size)]

    terms, sizes = [], []
    for b in range(B):
        valid = [p for p in pixels_of(labels) if p[0] == b and labels[p] >= 0]
        present = {int(labels[p]) for p in valid}
        right = {n: [p for p in valid if labels[p] == n == predictions[p]] for n in range(N)}
        for j in present:
            for k in present - {j}:
                hard = [p for p in valid if predictions[p] == j and labels[p] == k]
                if not hard or len(hard) > max_hard or not right[k]:
                    continue
                sizes.append(len(hard))
                positive, negative = full(right[k]), full(right[j] or hard)
                for i in full(hard):
                    s = [dot(vector(i), vector(m)) / temperature for m in positive]
                    A = logsumexp([math.log(confidence[m]) + value for m, value in zip(positive, s, strict=True)])
                    E = logsumexp([dot(vector(i), vector(n)) / temperature for n in negative])
                    terms.append(softplus(E - A))
    if not sizes:
        return 0.0
    return math.fsum(terms) * sum(sizes) / (len(sizes) * set_size) ** 2
