"""Every error that an argument can cause: its type, and a sentence that names the argument and what was passed.

Rows are (what the user did, the call, exception, the argument the sentence starts with, what it must quote).
"""

import math

import pytest
import torch
from error_calls import (
    ANCHORS,
    CLASSES,
    COUNTS,
    DEEP_LABELS,
    DEEP_LOGITS,
    FEATURES,
    LABELS,
    LOGITS,
    META,
    PYRAMID,
    ROW_LABELS,
    ROWS,
    SQUARED,
    VOLUME,
    anchors,
    assert_one_sentence,
    bane,
    criterion,
    errors,
    fuse,
    loss,
    module,
    nce,
    pixel,
    select,
    swapped,
)
from metric_errors import METRIC_ERRORS

import contextrast_kernels as ck

TABLE = [
    # class_anchors: the checks of feature maps, labels and classes
    ("features as a list", lambda: anchors(features=[1.0]), TypeError, "features", "list"),
    ("features as an array", lambda: anchors(features=FEATURES.numpy()), TypeError, "features", "ndarray"),
    ("integer features", lambda: anchors(features=FEATURES.long()), TypeError, "features", "int64"),
    ("bool features", lambda: anchors(features=FEATURES > 0), TypeError, "features", "bool"),
    ("complex features", lambda: anchors(features=FEATURES.to(torch.complex64)), TypeError, "features", "complex64"),
    ("float8 features", lambda: anchors(features=FEATURES.to(torch.float8_e4m3fn)), TypeError, "features", "float8"),
    ("features of rank 3", lambda: anchors(features=FEATURES[0]), ValueError, "features", r"\(3, 8, 8\)"),
    ("features of rank 2", lambda: anchors(features=FEATURES[0, 0]), ValueError, "features", r"\(8, 8\)"),
    ("features without channels", lambda: anchors(features=FEATURES[:, :0]), ValueError, "features", r"\(2, 0, 8, 8\)"),
    ("float labels", lambda: anchors(labels=LABELS.float()), TypeError, "labels", "float32"),
    ("bool labels", lambda: anchors(labels=LABELS > 0), TypeError, "labels", "bool"),
    ("labels as None", lambda: anchors(labels=None), TypeError, "labels", "None"),
    ("labels of rank 2", lambda: anchors(labels=LABELS[0]), ValueError, "labels", r"\(16, 16\)"),
    ("one-hot labels", lambda: anchors(labels=LOGITS.long()), ValueError, "labels", r"\(2, 4, 16, 16\)"),
    ("labels of another batch", lambda: anchors(labels=LABELS[:1]), ValueError, "labels", r"\(1, 16, 16\)"),
    ("labels on another device", lambda: anchors(labels=LABELS.to(META)), ValueError, "labels", "meta"),
    ("empty labels", lambda: anchors(labels=LABELS[:, :0]), ValueError, "labels", r"\(2, 0, 16\)"),
    ("num_classes 0", lambda: anchors(num_classes=0), ValueError, "num_classes", "0"),
    ("num_classes negative", lambda: anchors(num_classes=-3), ValueError, "num_classes", "-3"),
    ("num_classes a float", lambda: anchors(num_classes=4.0), TypeError, "num_classes", "4.0"),
    ("num_classes True", lambda: anchors(num_classes=True), TypeError, "num_classes", "True"),
    ("num_classes None", lambda: anchors(num_classes=None), TypeError, "num_classes", "None"),
    ("ignore_index a float", lambda: anchors(ignore_index=255.0), TypeError, "ignore_index", "255.0"),
    ("ignore_index None", lambda: anchors(ignore_index=None), TypeError, "ignore_index", "None"),
    ("normalize a number", lambda: anchors(normalize=2), TypeError, "normalize", "2"),
    # fuse_anchors
    ("anchors of rank 1", lambda: fuse(a=ANCHORS[0]), ValueError, "anchors", r"\(3,\)"),
    ("integer anchors", lambda: fuse(a=ANCHORS.long()), TypeError, "anchors", "int64"),
    ("top anchors of other classes", lambda: fuse(top=ANCHORS[:3]), ValueError, "top_anchors", r"\(3, 3\)"),
    ("top anchors of other width", lambda: fuse(top=ANCHORS[:, :2]), ValueError, "top_anchors", r"\(4, 2\)"),
    ("counts of other length", lambda: fuse(n=COUNTS[:3]), ValueError, "counts", r"\(3,\)"),
    ("top counts of other length", lambda: fuse(top_n=COUNTS[:2]), ValueError, "top_counts", r"\(2,\)"),
    ("weight above 1", lambda: fuse(weight=1.5), ValueError, "weight", "1.5"),
    ("weight below 0", lambda: fuse(weight=-0.1), ValueError, "weight", "-0.1"),
    ("weight NaN", lambda: fuse(weight=math.nan), ValueError, "weight", "nan"),
    ("weight a string", lambda: fuse(weight="0.7"), TypeError, "weight", "0.7"),
    # pixel_anchor_loss
    ("loss: integer features", lambda: pixel(features=FEATURES.int()), TypeError, "features", "int32"),
    ("loss: features of rank 3", lambda: pixel(features=FEATURES[0]), ValueError, "features", r"\(3, 8, 8\)"),
    ("loss: float labels", lambda: pixel(labels=LABELS.float()), TypeError, "labels", "float32"),
    ("loss: labels of another batch", lambda: pixel(labels=LABELS[:1]), ValueError, "labels", r"\(1, 16, 16\)"),
    ("loss: integer anchors", lambda: pixel(a=ANCHORS.long()), TypeError, "anchors", "int64"),
    ("loss: anchors of other width", lambda: pixel(a=ANCHORS[:, :2]), ValueError, "anchors", r"\(4, 2\)"),
    ("loss: anchors of rank 3", lambda: pixel(a=ANCHORS[None]), ValueError, "anchors", r"\(1, 4, 3\)"),
    ("loss: no anchors", lambda: pixel(a=ANCHORS[:0]), ValueError, "anchors", r"\(0, 3\)"),
    ("loss: anchors elsewhere", lambda: pixel(a=ANCHORS.to(META)), ValueError, "anchors", "meta"),
    ("negatives of label size", lambda: pixel(negatives=LABELS), ValueError, "negatives", r"\(2, 16, 16\)"),
    ("float negatives", lambda: pixel(negatives=CLASSES.float()), TypeError, "negatives", "float32"),
    ("bool negatives", lambda: pixel(negatives=CLASSES > 0), TypeError, "negatives", "bool"),
    ("integer base", lambda: pixel(base=CLASSES), TypeError, "base", "int64"),
    ("base of label size", lambda: pixel(base=LABELS > 0), ValueError, "base", r"\(2, 16, 16\)"),
    ("temperature 0", lambda: pixel(temperature=0), ValueError, "temperature", "0"),
    ("temperature negative", lambda: pixel(temperature=-0.1), ValueError, "temperature", "-0.1"),
    ("temperature NaN", lambda: pixel(temperature=math.nan), ValueError, "temperature", "nan"),
    ("temperature inf", lambda: pixel(temperature=math.inf), ValueError, "temperature", "inf"),
    ("temperature a string", lambda: pixel(temperature="0.1"), TypeError, "temperature", "0.1"),
    ("temperature None", lambda: pixel(temperature=None), TypeError, "temperature", "None"),
    ("loss: ignore_index a string", lambda: pixel(ignore_index="255"), TypeError, "ignore_index", "255"),
    ("loss: normalize None", lambda: pixel(normalize=None), TypeError, "normalize", "None"),
    # error_map
    ("predictions of rank 2", lambda: errors(predictions=CLASSES[0]), ValueError, "predictions", r"\(8, 8\)"),
    ("float class map", lambda: errors(predictions=CLASSES.float()), (TypeError, ValueError), "predictions", "float32"),
    ("integer logits", lambda: errors(predictions=LOGITS.long()), (TypeError, ValueError), "predictions", "int64"),
    ("bool predictions", lambda: errors(predictions=CLASSES > 0), TypeError, "predictions", "bool"),
    ("predictions as None", lambda: errors(predictions=None), TypeError, "predictions", "None"),
    ("predictions as a list", lambda: errors(predictions=[LOGITS]), TypeError, "predictions", "list"),
    ("logits of other classes", lambda: errors(num_classes=5), ValueError, "predictions", r"\(2, 4, 16, 16\)"),
    (
        "logits without classes",
        lambda: errors(predictions=LOGITS[:, :0]),
        ValueError,
        "predictions",
        r"\(2, 0, 16, 16\)",
    ),
    (
        "predictions of another batch",
        lambda: errors(predictions=LOGITS[:1]),
        ValueError,
        "(predictions|labels)",
        r"\((1|2),",
    ),
    (
        "predictions elsewhere",
        lambda: errors(predictions=LOGITS.to(META)),
        ValueError,
        "(predictions|labels)",
        "(meta|cpu)",
    ),
    ("empty predictions", lambda: errors(predictions=LOGITS[..., :0]), ValueError, "predictions", r"\(2, 4, 16, 0\)"),
    ("errors: float labels", lambda: errors(labels=LABELS.half()), TypeError, "labels", "float16"),
    ("errors: labels of rank 2", lambda: errors(labels=LABELS[0]), ValueError, "labels", r"\(16, 16\)"),
    ("errors: num_classes 0", lambda: errors(CLASSES, num_classes=0), ValueError, "num_classes", "0"),
    ("errors: num_classes a float", lambda: errors(CLASSES, num_classes=2.5), TypeError, "num_classes", "2.5"),
    ("errors: ignore_index a float", lambda: errors(ignore_index=0.5), TypeError, "ignore_index", "0.5"),
    # edge_distance, distance_transform
    ("float classes", lambda: ck.edge_distance(CLASSES.float()), TypeError, "classes", "float32"),
    ("bool classes", lambda: ck.edge_distance(CLASSES > 0), TypeError, "classes", "bool"),
    ("classes of rank 2", lambda: ck.edge_distance(CLASSES[0]), ValueError, "classes", r"\(8, 8\)"),
    ("classes as None", lambda: ck.edge_distance(None), TypeError, "classes", "None"),
    ("too wide", lambda: ck.edge_distance(torch.zeros(1, 1, 16385).long()), ValueError, "classes", "16385"),
    ("too high", lambda: ck.edge_distance(torch.zeros(1, 16385, 1).long()), ValueError, "classes", "16385"),
    ("squared a number", lambda: ck.edge_distance(CLASSES, squared=1), TypeError, "squared", "1"),
    ("mask of rank 1", lambda: ck.distance_transform(torch.zeros(5)), ValueError, "mask", r"\(5,\)"),
    ("mask as a list", lambda: ck.distance_transform([[0, 1]]), TypeError, "mask", "list"),
    ("mask too wide", lambda: ck.distance_transform(torch.zeros(1, 16385)), ValueError, "mask", "16385"),
    ("mask too high", lambda: ck.distance_transform(torch.zeros(16385, 1)), ValueError, "mask", "16385"),
    ("transform: squared None", lambda: ck.distance_transform(CLASSES, squared=None), TypeError, "squared", "None"),
    # select_nearest
    ("select: float classes", lambda: select(classes=CLASSES.float()), TypeError, "classes", "float32"),
    ("select: classes of rank 2", lambda: select(classes=CLASSES[0]), ValueError, "classes", r"\(8, 8\)"),
    ("select: complex distances", lambda: select(squared=SQUARED + 0j), TypeError, "distance_sq", "complex64"),
    ("select: bool distances", lambda: select(squared=SQUARED > 0), TypeError, "distance_sq", "bool"),
    (
        "select: distances of other size",
        lambda: select(squared=SQUARED[:, 1:]),
        ValueError,
        "distance_sq",
        r"\(2, 7, 8\)",
    ),
    ("select: distances elsewhere", lambda: select(squared=SQUARED.to(META)), ValueError, "distance_sq", "meta"),
    (
        "select: too wide",
        lambda: select(*(torch.zeros(1, 1, 16385, dtype=t) for t in (torch.int64, torch.int32))),
        ValueError,
        "(classes|distance_sq)",
        "16385",
    ),
    ("ratio above 1", lambda: select(ratio=1.01), ValueError, "ratio", "1.01"),
    ("ratio in percent", lambda: select(ratio=50), ValueError, "ratio", "50"),
    ("ratio negative", lambda: select(ratio=-0.5), ValueError, "ratio", "-0.5"),
    ("ratio NaN", lambda: select(ratio=math.nan), ValueError, "ratio", "nan"),
    ("ratio a string", lambda: select(ratio="half"), TypeError, "ratio", "half"),
    ("select: num_classes 0", lambda: select(num_classes=0), ValueError, "num_classes", "0"),
    ("bane: a class map without num_classes", lambda: bane(LABELS), ValueError, "num_classes", "None"),
    ("seed a float", lambda: select(seed=1.5), TypeError, "seed", "1.5"),
    ("seed None", lambda: select(seed=None), TypeError, "seed", "None"),
    ("seed too large", lambda: select(seed=2**63), ValueError, "seed", str(2**63)),
    ("seed too small", lambda: select(seed=-(2**63) - 1), ValueError, "seed", str(2**63 + 1)),
    ("seed of two elements", lambda: select(seed=torch.zeros(2).long()), (TypeError, ValueError), "seed", r"\(2,\)"),
    ("seed a float tensor", lambda: select(seed=torch.zeros(1)), (TypeError, ValueError), "seed", "float32"),
    ("seed an int32 tensor", lambda: select(seed=torch.zeros(1).int()), (TypeError, ValueError), "seed", "int32"),
    # bane_negatives
    ("unknown negatives", lambda: bane(negatives="hard"), ValueError, "negatives", "hard"),
    ("negatives None", lambda: bane(negatives=None), (TypeError, ValueError), "negatives", "None"),
    ("unknown distance_at", lambda: bane(distance_at="half"), ValueError, "distance_at", "half"),
    ("size a number", lambda: bane(size=8), TypeError, "size", "8"),
    ("size of three", lambda: bane(size=(1, 8, 8)), (TypeError, ValueError), "size", r"\(1, 8, 8\)"),
    ("size negative", lambda: bane(size=(8, -8)), ValueError, "size", "-8"),
    ("size of floats", lambda: bane(size=(8.0, 8.0)), TypeError, "size", "8.0"),
    ("size too large", lambda: bane(size=(8, 16385)), ValueError, "size", "16385"),
    ("bane: ratio above 1", lambda: bane(ratio=2), ValueError, "ratio", "2"),
    ("bane: float labels", lambda: bane(labels=LABELS.float()), TypeError, "labels", "float32"),
    (
        "bane: float class map",
        lambda: bane(predictions=CLASSES.double()),
        (TypeError, ValueError),
        "predictions",
        "float64",
    ),
    ("bane: logits of other classes", lambda: bane(num_classes=19), ValueError, "predictions", r"\(2, 4, 16, 16\)"),
    (
        "bane: predictions of another batch",
        lambda: bane(predictions=CLASSES[:1]),
        ValueError,
        "(predictions|labels)",
        r"\((1|2),",
    ),
    (
        "bane: labels too wide",
        lambda: bane(torch.zeros(1, 1, 1).long(), torch.zeros(1, 1, 16385).long()),
        ValueError,
        "labels",
        "16385",
    ),
    ("bane: seed a float", lambda: bane(seed=0.0), TypeError, "seed", "0.0"),
    # volumes
    (
        "labels of a map, volume",
        lambda: anchors(features=VOLUME),
        ValueError,
        "labels",
        r"\(2, 16, 16\).*Pass a volume",
    ),
    ("labels of a volume, map", lambda: anchors(labels=DEEP_LABELS), ValueError, "labels", r"\(2, 4, 16, 16\)"),
    ("features of rank 6", lambda: anchors(features=VOLUME[None]), ValueError, "features", r"\(1, 2, 3, 4, 8, 8\)"),
    (
        "features of a volume too deep",
        lambda: anchors(features=torch.zeros(1).expand(1, 1, 16385, 1, 1)),
        ValueError,
        "features",
        "16385",
    ),
    (
        "features of too many voxels",
        lambda: anchors(features=torch.zeros(1).expand(1, 1, 16384, 16384, 9)),
        ValueError,
        "features",
        "voxels",
    ),
    ("pixel loss: a map", lambda: pixel(features=VOLUME), ValueError, "labels", r"\(2, 16, 16\).*Pass a volume"),
    (
        "total: labels of a map",
        lambda: loss(features=[VOLUME], layer_weights=(1,)),
        ValueError,
        "labels",
        r"\(2, 16, 16\).*Pass a volume",
    ),
    (
        "total: logits of a map",
        lambda: loss(features=[VOLUME], labels=DEEP_LABELS, layer_weights=(1,)),
        ValueError,
        "predictions",
        r"\(2, 4, 16, 16\)",
    ),
    (
        "maps and volumes",
        lambda: loss(features=[FEATURES, VOLUME[:, :, :1, :4, :4]], layer_weights=(1, 1)),
        ValueError,
        r"features\[1\]",
        "not both",
    ),
    (
        "a layer that grows in depth",
        lambda: loss(features=[VOLUME, torch.randn(2, 3, 5, 4, 4)], layer_weights=(1, 1)),
        ValueError,
        r"features\[1\]",
        r"\(5, 4, 4\)",
    ),
    (
        "a size of two for a volume",
        lambda: bane(labels=DEEP_LABELS, predictions=DEEP_LABELS, num_classes=4, size=(4, 4)),
        TypeError,
        "size",
        r"\(4, 4\)",
    ),
    ("criterion: labels of a map", lambda: criterion(logits=DEEP_LOGITS), ValueError, "labels", r"\(2, 16, 16\)"),
    ("spatial_dims 4", lambda: ck.ProjectionHead(3, spatial_dims=4), ValueError, "spatial_dims", "4"),
    ("sampling of three for a map", lambda: bane(sampling=(1, 1, 1)), ValueError, "sampling", "3"),
    ("sampling 0", lambda: bane(sampling=0), ValueError, "sampling", "0"),
    ("sampling negative", lambda: loss(sampling=(1.0, -1.0)), ValueError, "sampling", "-1.0"),
    ("sampling NaN", lambda: module(sampling=math.nan), ValueError, "sampling", "nan"),
    ("sampling of four", lambda: module(sampling=(1, 1, 1, 1)), ValueError, "sampling", "4"),
    # contextrast_loss
    ("one tensor instead of a list", lambda: loss(features=FEATURES), TypeError, "features", "float32"),
    ("no layers", lambda: loss(features=[]), (TypeError, ValueError), "features", r"\[\]"),
    ("a dictionary of layers", lambda: loss(features={"0": FEATURES}), TypeError, "features", "dict"),
    ("a layer that is None", lambda: loss(features=swapped(2, None)), TypeError, r"features\[2\]", "None"),
    ("a layer of integers", lambda: loss(features=swapped(1, PYRAMID[1].long())), TypeError, r"features\[1\]", "int64"),
    (
        "a layer of rank 3",
        lambda: loss(features=swapped(3, PYRAMID[3][0])),
        ValueError,
        r"features\[3\]",
        r"\(3, 1, 1\)",
    ),
    (
        "a layer of other width",
        lambda: loss(features=swapped(1, PYRAMID[1][:, :2])),
        ValueError,
        r"features\[1\]",
        r"\(2, 2, 4, 4\)",
    ),
    (
        "a layer of other dtype",
        lambda: loss(features=swapped(2, PYRAMID[2].half())),
        (TypeError, ValueError),
        r"features\[2\]",
        "float16",
    ),
    (
        "a layer of another batch",
        lambda: loss(features=swapped(1, PYRAMID[1][:1])),
        ValueError,
        r"features\[1\]",
        r"\(1, 3, 4, 4\)",
    ),
    ("a layer elsewhere", lambda: loss(features=swapped(3, PYRAMID[3].to(META))), ValueError, r"features\[3\]", "meta"),
    ("layers from low to high", lambda: loss(features=PYRAMID[::-1]), ValueError, r"features\[1\]", r"\(2, 2\)"),
    (
        "one side grows",
        lambda: loss(features=swapped(1, torch.randn(2, 3, 4, 9))),
        ValueError,
        r"features\[1\]",
        r"\(4, 9\)",
    ),
    ("three layers, four weights", lambda: loss(features=PYRAMID[:3]), ValueError, "layer_weights", "4"),
    ("four layers, two weights", lambda: loss(layer_weights=(1, 1)), ValueError, "layer_weights", "2"),
    ("no weights", lambda: loss(layer_weights=()), (TypeError, ValueError), "layer_weights", r"\(\)"),
    ("one weight", lambda: loss(layer_weights=1.0), TypeError, "layer_weights", "1.0"),
    ("a weight of NaN", lambda: loss(layer_weights=(1, 1, math.nan, 1)), ValueError, "layer_weights", "nan"),
    ("a negative weight", lambda: loss(layer_weights=(1, -1, 1, 1)), ValueError, "layer_weights", "-1"),
    ("a weight of text", lambda: loss(layer_weights=(1, "1", 1, 1)), TypeError, "layer_weights", "1"),
    ("weights as text", lambda: loss(layer_weights="1111"), TypeError, "layer_weights", "1111"),
    ("loss: logits of other classes", lambda: loss(num_classes=19), ValueError, "predictions", r"\(2, 4, 16, 16\)"),
    (
        "loss: float class map",
        lambda: loss(predictions=CLASSES.float()),
        (TypeError, ValueError),
        "predictions",
        "float32",
    ),
    (
        "loss: predictions of another batch",
        lambda: loss(predictions=LOGITS[:1]),
        ValueError,
        "predictions",
        r"\(1, 4, 16, 16\)",
    ),
    ("loss: predictions elsewhere", lambda: loss(predictions=LOGITS.to(META)), ValueError, "predictions", "meta"),
    ("total: float labels", lambda: loss(labels=LABELS.float()), TypeError, "labels", "float32"),
    ("total: labels of another batch", lambda: loss(labels=LABELS[:1]), ValueError, "labels", r"\(1, 16, 16\)"),
    ("total: labels elsewhere", lambda: loss(labels=LABELS.to(META)), ValueError, "labels", "meta"),
    ("total: one-hot labels", lambda: loss(labels=LOGITS.long()), ValueError, "labels", r"\(2, 4, 16, 16\)"),
    ("total: num_classes a tensor", lambda: loss(num_classes=torch.tensor(4)), TypeError, "num_classes", "int64"),
    ("total: seed a float", lambda: loss(seed=0.5), TypeError, "seed", "0.5"),
    (
        "total: seed of two elements",
        lambda: loss(seed=torch.zeros(2).long()),
        (TypeError, ValueError),
        "seed",
        r"\(2,\)",
    ),
    # info_nce
    ("rows of rank 3", lambda: nce(rows=ROWS[None]), ValueError, "rows", r"\(1, 5, 3\)"),
    ("integer rows", lambda: nce(rows=ROWS.long()), TypeError, "rows", "int64"),
    ("float8 rows", lambda: nce(rows=ROWS.to(torch.float8_e4m3fn)), TypeError, "rows", "float8"),
    ("bool row labels", lambda: nce(labels=ROW_LABELS > 0), TypeError, "row_labels", "bool"),
    ("unknown positives", lambda: nce(positives="all"), ValueError, "positives", "all"),
    ("reduction by sum", lambda: nce(reduction="sum"), ValueError, "reduction", "sum"),
    ("bool row negatives", lambda: nce(row_negatives=ROW_LABELS > 0), TypeError, "row_negatives", "bool"),
    (
        "row negatives too many",
        lambda: nce(row_negatives=ROW_LABELS.repeat(2)),
        ValueError,
        "row_negatives",
        r"\(10,\)",
    ),
    (
        "column negatives of the rows' length",
        lambda: nce(ROWS, ROW_LABELS, ROWS[:3], ROW_LABELS[:3], column_negatives=ROW_LABELS),
        ValueError,
        "column_negatives",
        r"\(5,\)",
    ),
    ("column weights as a matrix", lambda: nce(column_weights=ROWS), ValueError, "column_weights", r"\(5, 3\)"),
    ("integer column weights", lambda: nce(column_weights=ROW_LABELS), TypeError, "column_weights", "int64"),
    ("column weights elsewhere", lambda: nce(column_weights=ROWS[:, 0].to(META)), ValueError, "column_weights", "meta"),
    ("column weights as a list", lambda: nce(column_weights=[1.0] * 5), TypeError, "column_weights", "list"),
    ("rows as a list", lambda: nce(rows=[[1.0]]), TypeError, "rows", "list"),
    ("row labels of other length", lambda: nce(labels=ROW_LABELS[:4]), ValueError, "row_labels", r"\(4,\)"),
    ("float row labels", lambda: nce(labels=ROW_LABELS.float()), TypeError, "row_labels", "float32"),
    ("row labels elsewhere", lambda: nce(labels=ROW_LABELS.to(META)), ValueError, "row_labels", "meta"),
    (
        "columns of other width",
        lambda: nce(ROWS, ROW_LABELS, ROWS[:, :2], ROW_LABELS),
        ValueError,
        "columns",
        r"\(5, 2\)",
    ),
    (
        "columns of other dtype",
        lambda: nce(ROWS, ROW_LABELS, ROWS.half(), ROW_LABELS),
        (TypeError, ValueError),
        "columns",
        "float16",
    ),
    (
        "columns elsewhere",
        lambda: nce(ROWS, ROW_LABELS, ROWS.to(META), ROW_LABELS.to(META)),
        ValueError,
        "columns",
        "meta",
    ),
    ("columns without labels", lambda: nce(ROWS, ROW_LABELS, ROWS), ValueError, "column_labels", "None"),
    ("labels without columns", lambda: nce(column_labels=ROW_LABELS), ValueError, "column", ""),
    (
        "column labels of other length",
        lambda: nce(ROWS, ROW_LABELS, ROWS, ROW_LABELS[1:]),
        ValueError,
        "column_labels",
        r"\(4,\)",
    ),
    ("nce: temperature 0", lambda: nce(temperature=0.0), ValueError, "temperature", "0"),
    ("nce: ignore_index None", lambda: nce(ignore_index=None), TypeError, "ignore_index", "None"),
    # modules
    ("head without channels", lambda: ck.ProjectionHead(0), ValueError, "in_channels", "0"),
    ("head of float channels", lambda: ck.ProjectionHead(4.0), TypeError, "in_channels", "4.0"),
    ("head of dim 0", lambda: ck.ProjectionHead(4, 0), ValueError, "dim", "0"),
    ("module: debug a number", lambda: module(debug=1), TypeError, "debug", "1"),
    ("module: seed a float", lambda: module(seed=1.0), TypeError, "seed", "1.0"),
    ("module: seed too large", lambda: module(seed=2**63), ValueError, "seed", str(2**63)),
    ("module: three layers", lambda: module()(PYRAMID[:3], LABELS, LOGITS), ValueError, "layer_weights", "4"),
    (
        "module: logits of other classes",
        lambda: module(num_classes=7)(PYRAMID, LABELS, LOGITS),
        ValueError,
        "predictions",
        r"\(2, 4,",
    ),
    ("module: float labels", lambda: module()(PYRAMID, LABELS.float(), LOGITS), TypeError, "labels", "float32"),
    # ContextrastCriterion
    ("criterion: weight negative", lambda: criterion(weight=-0.1), ValueError, "weight", "-0.1"),
    ("criterion: weight NaN", lambda: criterion(weight=math.nan), ValueError, "weight", "nan"),
    ("criterion: smoothing above 1", lambda: criterion(label_smoothing=1.1), ValueError, "label_smoothing", "1.1"),
    ("criterion: three weights", lambda: criterion(class_weights=[1, 2, 3]), ValueError, "class_weights", r"\(3,\)"),
    ("criterion: negative weight", lambda: criterion(class_weights=[1, 2, 3, -1]), ValueError, "class_weights", "4"),
    ("criterion: words as weights", lambda: criterion(class_weights="1234"), TypeError, "class_weights", "1234"),
    ("criterion: predictions", lambda: criterion(logits=LABELS), TypeError, "logits", "int64"),
    ("criterion: logits as a dict", lambda: criterion(logits={"out": LOGITS}), TypeError, "logits", "dict"),
    ("criterion: logits of 3 classes", lambda: criterion(logits=LOGITS[:, :3]), ValueError, "logits", r"4 channels"),
    ("criterion: logits of another batch", lambda: criterion(logits=LOGITS[:1]), ValueError, "logits", r"\(1, 4"),
    ("criterion: logits without pixels", lambda: criterion(logits=LOGITS[..., :0]), ValueError, "logits", "one pixel"),
    ("criterion: float labels", lambda: criterion(labels=LABELS.float()), TypeError, "labels", "float32"),
    ("criterion: three layers", lambda: criterion(PYRAMID[:3]), ValueError, "layer_weights", "4"),
    ("criterion: ratio", lambda: criterion(ratio=3), ValueError, "ratio", "3"),
    # backend
    ("unknown backend", lambda: ck.backend("cuda").__enter__(), ValueError, "backend", "cuda"),
    ("backend None", lambda: ck.backend(None).__enter__(), (TypeError, ValueError), "backend", "None"),
    *METRIC_ERRORS,
]


# Options that contextrast_loss checks at the call and ContextrastLoss already when it is built.
OPTIONS = [
    ({"num_classes": 0}, ValueError, "num_classes", "0"),
    ({"num_classes": 1}, ValueError, "num_classes", "1"),
    ({"num_classes": 4.5}, TypeError, "num_classes", "4.5"),
    ({"ignore_index": "void"}, TypeError, "ignore_index", "void"),
    ({"temperature": 0}, ValueError, "temperature", "0"),
    ({"temperature": math.nan}, ValueError, "temperature", "nan"),
    ({"temperature": [0.1]}, TypeError, "temperature", r"\[0.1\]"),
    ({"fusion_weight": 1.2}, ValueError, "fusion_weight", "1.2"),
    ({"fusion_weight": -0.2}, ValueError, "fusion_weight", "-0.2"),
    ({"fusion_weight": math.nan}, ValueError, "fusion_weight", "nan"),
    ({"negatives": "semihard"}, ValueError, "negatives", "semihard"),
    ({"ratio": 50}, ValueError, "ratio", "50"),
    ({"ratio": math.nan}, ValueError, "ratio", "nan"),
    ({"ratio": None}, TypeError, "ratio", "None"),
    ({"base_rate": 1.1}, ValueError, "base_rate", "1.1"),
    ({"base_rate": -1}, ValueError, "base_rate", "-1"),
    ({"base_rate": math.nan}, ValueError, "base_rate", "nan"),
    ({"base_sampler": ck.Sampler("uniform", 20, 5), "base_rate": 0.5}, ValueError, "base_sampler", "base_rate=0.5"),
    ({"base_sampler": "uniform"}, ValueError, "base_sampler", "uniform"),
    ({"distance_at": "both"}, ValueError, "distance_at", "both"),
    ({"normalize": "yes"}, TypeError, "normalize", "yes"),
    ({"normalize_anchors": 1}, TypeError, "normalize_anchors", "1"),
    ({"detach_anchors": None}, TypeError, "detach_anchors", "None"),
    ({"group": "nccl"}, TypeError, "group", "nccl"),
    ({"group": 0}, TypeError, "group", "0"),
    ({"negatives": "none"}, ValueError, "negatives", "none"),
    ({"ratio": 0}, ValueError, "(negatives|ratio)", "0"),
    ({"negatives": "semi-hard", "ratio": 0.0}, ValueError, "(negatives|ratio)", "0"),
    ({"layer_weights": (1, 1, 1, math.inf)}, ValueError, "layer_weights", "inf"),
]


@pytest.mark.parametrize(
    ("call", "exception", "argument", "quoted"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_invalid_arguments_raise_clear_errors(call, exception, argument, quoted):
    assert_one_sentence(call, exception, argument, quoted)


@pytest.mark.parametrize(("options", "exception", "argument", "quoted"), OPTIONS, ids=[str(row[0]) for row in OPTIONS])
def test_options_are_refused_at_the_call_and_at_construction(options, exception, argument, quoted):
    assert_one_sentence(lambda: loss(**options), exception, argument, quoted)
    assert_one_sentence(lambda: module(**options), exception, argument, quoted)


@pytest.mark.skipif(ck.available()["triton"] != "ok", reason=f"triton: {ck.available()['triton']}")
def test_errors_are_the_same_with_kernels_and_come_before_any_launch():
    from contextrast_kernels.kernels import _launch

    with ck.backend("triton"), _launch.recording() as launches:
        for name, call, exception, argument, quoted in TABLE:
            assert_one_sentence(call, exception, argument, quoted)
            assert not launches or "change" in name, name  # a second batch unlike the first, which was fine
            launches.clear()
        for options, exception, argument, quoted in OPTIONS:
            assert_one_sentence(lambda options=options: loss(**options), exception, argument, quoted)
            assert not launches, options


def test_names_of_the_table_are_unique():
    assert len({row[0] for row in TABLE}) == len(TABLE)


def test_valid_calls_raise_nothing():
    """Every function of the table accepts its own defaults, so a row fails for the reason it states."""
    assert loss().isfinite()
    assert module()(PYRAMID, LABELS, LOGITS).isfinite()
    assert criterion().isfinite()
    for call in (anchors, fuse, pixel, errors, bane, select, nce):
        call()


def test_an_unknown_backend_in_the_environment_raises(monkeypatch):
    monkeypatch.setenv("CONTEXTRAST_BACKEND", "fast")
    with pytest.raises((ValueError, RuntimeError), match=r"CONTEXTRAST_BACKEND.*fast"):
        ck.edge_distance(CLASSES)


def test_the_environment_is_read_at_each_call_and_the_context_wins(monkeypatch):
    monkeypatch.setenv("CONTEXTRAST_BACKEND", "reference")
    expected = ck.edge_distance(CLASSES)
    monkeypatch.setenv("CONTEXTRAST_BACKEND", "fast")
    with ck.backend("reference"):
        assert torch.equal(ck.edge_distance(CLASSES), expected)


def test_a_forced_backend_that_cannot_run_raises_its_reason(monkeypatch):
    """Ops it has raise; ops it does not have, and everything under "auto", run on what is there."""
    expected = bane()
    monkeypatch.setattr("contextrast_kernels.native.status", lambda device_type: "no compiler was found")
    assert ck.available()["native"] == "no compiler was found" or torch.cuda.is_available()
    assert torch.equal(bane(), expected)
    with ck.backend("native"):
        assert anchors()[0].isfinite().all()
        for call in (bane, errors, select, lambda: ck.edge_distance(CLASSES), lambda: ck.distance_transform(CLASSES)):
            with pytest.raises(RuntimeError, match=r"native.*no compiler was found"):
                call()


def test_an_error_restores_the_backend():
    with pytest.raises(TypeError, match="labels"), ck.backend("reference"):
        anchors(labels=None)
    with ck.backend("reference"):
        with pytest.raises(ValueError, match="backend"), ck.backend("nonsense"):
            pass
        assert anchors()[0].isfinite().all()
