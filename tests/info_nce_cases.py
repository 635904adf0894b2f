"""Every combination of the options of ``info_nce`` that say which columns are a row's negatives and how they count."""

import torch

SETS = ["labels", "named by columns", "named by rows", "named by both", "names and weights", "weights"]


def chosen(rng, kind, R, C, N=3):
    """Options that name negatives by rows, columns or both, and weights of columns."""
    codes = {n: torch.from_numpy(rng.integers(-1, N, n)) for n in (R, C)}
    weights = rng.choice([0.0, 0.5, 1.0, 3.0], C)
    every = {
        "row_negatives": codes[R],
        "column_negatives": codes[C],
        "column_weights": torch.from_numpy(weights),
    }
    names = {
        "labels": (),
        "named by columns": ("column_negatives",),
        "named by rows": ("row_negatives",),
        "named by both": ("row_negatives", "column_negatives"),
        "names and weights": ("column_negatives", "column_weights"),
        "weights": ("column_weights",),
    }
    return {name: every[name] for name in names[kind]}
