"""Inputs for the tests: scenes with the errors of a half-trained network, maps that break distance transforms."""

import numpy as np
import pytest
import torch


def blobs(rng, B, N, H, W, cell=4):
    """Piecewise constant maps of N classes: random cells, shifted by rows so that borders are not only straight."""
    coarse = rng.integers(0, N, (B, H // cell + 3, W // cell + 3))
    r, c = np.mgrid[:H, :W]
    return coarse[:, (r + c // 3) // cell % coarse.shape[1], (c + r // 5) // cell % coarse.shape[2]]


def scene(rng, B=2, N=4, H=17, W=23, ignored=0.1, wrong=0.2, ignore_index=255):
    """Labels with ignored pixels, and a class map that is wrong along borders, in blobs and in single pixels."""
    labels = blobs(rng, B, N, H, W)
    predictions = np.roll(labels, (1, 1), (1, 2))
    patches = blobs(rng, B, 4, H, W) == 0
    predictions = np.where(patches, blobs(rng, B, N, H, W), predictions)
    predictions = np.where(rng.random((B, H, W)) < wrong, rng.integers(0, N, (B, H, W)), predictions)
    labels = np.where(rng.random((B, H, W)) < ignored, ignore_index, labels)
    return torch.from_numpy(labels), torch.from_numpy(predictions)


def pyramid(rng, B=2, D=5, sizes=((9, 12), (5, 6), (3, 3), (2, 2)), dtype=torch.float64):
    """Projected features of the layers, of maps or volumes, from high to low resolution."""
    return [torch.from_numpy(rng.standard_normal((B, D, *size)) + 0.3).to(dtype) for size in sizes]


def logits_of(class_map, num_classes, rng):
    """Logits (B, N, ...) whose argmax is class_map."""
    noise = rng.random((class_map.shape[0], num_classes, *class_map.shape[1:]))
    hot = np.arange(num_classes).reshape(-1, *(1,) * (class_map.ndim - 1)) == class_map.numpy()[:, None]
    return torch.from_numpy((noise + 2.0 * hot).astype(np.float32))


def leaves(tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def families(rng, H, W):
    """Adversarial class maps (H, W), -1 outside: name -> map. Every one is a case some distance transform got wrong."""
    r, c = np.mgrid[:H, :W]
    out = np.full((H, W), -1)

    def put(where, value=0):
        return np.where(where, value, out)

    def hole(i, j):
        return np.where((r == i) & (c == j), -1, 0)

    ring = np.maximum(abs(r - H // 2), abs(c - W // 2))
    disc = (r - H // 2) ** 2 + (c - W // 2) ** 2
    comb = (c % 3 == 0) | (r == 0)
    spiral = np.zeros((H, W), dtype=bool)
    i, j, di, dj = 0, -1, 0, 1
    steps = [W, *(n for k in range(1, max(H, W)) for n in (H - 2 * k + 1, W - 2 * k) if n > 0)]
    for n in steps:
        for _ in range(n):
            i, j = i + di, j + dj
            if 0 <= i < H and 0 <= j < W:
                spiral[i, j] = True
        di, dj = dj, -di
    random_labels = rng.integers(-1, 3, (H, W))
    named = {
        "empty": out,
        "whole image": put(r >= 0),
        "whole image, class 7": put(r >= 0, 7),
        "two halves": np.where(c < W // 2, 0, 1),
        "hole in the centre": hole(H // 2, W // 2),
        "hole in a corner": hole(0, 0),
        "hole in the last corner": hole(H - 1, W - 1),
        "hole on the border": hole(0, W // 2),
        "two far sites": np.where(((r == 0) & (c == 0)) | ((r == H - 1) & (c == W - 1)), -1, 0),
        "single pixel": put((r == H // 2) & (c == W // 3)),
        "single corner pixel": put((r == H - 1) & (c == 0)),
        "single row": put(r == H // 2),
        "single column": put(c == W // 2),
        "checkerboard": (r + c) % 2 - 1,
        "checkerboard of two classes": (r + c) % 2,
        "diagonal": put(abs(r - c) <= 1),
        "parabola": put((c - W // 2) ** 2 <= 3 * r),
        "comb": put(comb),
        "spiral": put(spiral),
        "rings": ring % 3 - 1,
        "rings of classes": ring // 2 % 3,
        "disc": put(disc <= (min(H, W) // 2) ** 2),
        "plus touching four borders": put((abs(r - H // 2) <= 1) | (abs(c - W // 2) <= 1)),
        "class on both sides of an ignored strip": np.where(abs(c - W // 2) <= 1, -1, 0),
        "two classes and an ignored strip": np.where(c == W // 2, -1, np.where(c < W // 2, 0, 1)),
        "random labels": random_labels,
        "blobs": blobs(rng, 1, 4, H, W, cell=5)[0] - 1,
        "other negative numbers are outside too": np.where(
            random_labels < 0, rng.integers(-9, 0, (H, W)), random_labels
        ),
    }
    for width in (1, 2, 3):
        named[f"horizontal stripes of {width}"] = r // width % 3 - 1
        named[f"vertical stripes of {width}"] = c // width % 3 - 1
    for percent in (0.1, 1, 5, 20, 50, 80, 95, 99, 99.9):
        named[f"density {percent} %"] = np.where(rng.random((H, W)) * 100 < percent, rng.integers(0, 2, (H, W)), -1)
        named[f"one class, density {percent} %"] = np.where(rng.random((H, W)) * 100 < percent, 0, -1)
    return {name: np.ascontiguousarray(values, dtype=np.int64) for name, values in named.items()}


def crossed(cases, variants):
    """Pairs of every case and every variant, such as a dtype. One variant of each case is tested in every run, the
    others are slow tests."""
    return [
        pytest.param(case, variant, id=f"{case}-{variant}", marks=[pytest.mark.slow] if (i + j) % len(variants) else [])
        for i, case in enumerate(cases)
        for j, variant in enumerate(variants)
    ]


def volume_scene(rng, B=2, N=4, Z=5, H=9, W=11, ignored=0.1, wrong=0.2, ignore_index=255):
    """Labels with ignored voxels and a wrong class map, (B, Z, H, W): blocks of 2 x 3 x 3, shifted in every plane."""
    coarse = rng.integers(0, N, (2, B, Z // 2 + 2, H // 3 + 3, W // 3 + 3))
    d, r, c = np.mgrid[:Z, :H, :W]
    labels, others = coarse[:, :, (d + r % 2) // 2, (r + d) // 3 % coarse.shape[3], (c + r // 4) // 3 % coarse.shape[4]]
    patches = blobs(rng, B * Z, 3, H, W).reshape(B, Z, H, W) == 0
    predictions = np.where(patches, others, np.roll(labels, 1, 2))
    predictions = np.where(rng.random(labels.shape) < wrong, rng.integers(0, N, labels.shape), predictions)
    labels = np.where(rng.random(labels.shape) < ignored, ignore_index, labels)
    return torch.from_numpy(labels), torch.from_numpy(predictions)
