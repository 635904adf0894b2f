"""Edge distance, selection and negatives of a batch on a GPU, side by side with what people use today.

    python benchmarks/bench_edt_gpu.py [--repeat-ms 200]

Edge distance of 8 maps of 512 x 1024: this library, called and as a replayed CUDA graph; CuPy, which transforms one
binary map a call: once an image, given the edges, and once an image and class, finding the edges. Selection of the
nearest half of each class: this library; torch.topk for each class, whose ties fall anyhow; a sort of 64-bit keys.
Negatives of four layers from bfloat16 logits: this library. Exact rows are compared with the library's CPU code before
they are timed. Times are medians over repeats with a cold L2 cache (triton.testing.do_bench). Rows go to
results/<gpu>.csv, with the columns of bench_edt.py; `cpu` holds the GPU's name.
"""

import argparse
import csv
import functools
import pathlib
import re
import subprocess
import sys

import numpy as np
import torch
from scipy import ndimage

from contextrast_kernels import native

B, H, W, N = 8, 512, 1024, 19
RATIO = 0.5
COLUMNS = (
    *("row", "case", "regime", "threads", "median_ms", "iqr_ms", "ratio_to_fastest_peer"),
    *("cpu", "torch", "commit"),
)
CALLED, REPLAYED = "contextrast native", "contextrast native, CUDA graph"


@functools.cache
def fields(sigma, seed):
    """N smooth random fields an image; their arg-max is a map of N classes in regions about sigma pixels wide."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((B, N, H, W), dtype=np.float32)
    smooth = ndimage.gaussian_filter(noise, (0, 0, sigma, sigma))
    return smooth / smooth.std(axis=(2, 3), keepdims=True)


def labels():
    values = fields(24, 1).argmax(1)
    values[:, -40:] = 255
    return torch.from_numpy(values)


REGIMES = {
    "trained, 9 % errors": lambda: (fields(24, 1) + 0.10 * fields(6, 2)).argmax(1),
    "half trained, 34 % errors": lambda: (fields(24, 1) + 0.45 * fields(6, 2)).argmax(1),
    "large wrong regions": lambda: fields(40, 5).argmax(1),
    "collapsed to one class": lambda: np.full((B, H, W), 3),
    "noise": lambda: np.random.default_rng(3).integers(0, N, (B, H, W)),
}


def errors(regime):
    """Wrongly predicted classes, -1 elsewhere: int64 (B, H, W)."""
    if regime == "one wrong class everywhere":
        return torch.zeros(B, H, W, dtype=torch.int64)
    predictions = torch.from_numpy(REGIMES[regime]())
    return native.error_map(predictions, labels(), N, 255).long()


def graph_of(call):
    """The call as a graph that writes the same result again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay():
        graph.replay()
        return result

    return replay


# ---- Peers


def cupy_transform(mask):
    import cupy
    from cupyx.scipy import ndimage as cupy_ndimage

    return cupy_ndimage.distance_transform_edt(cupy.from_dlpack(mask), float64_distances=False)


def cupy_each_image(not_edges):
    return [cupy_transform(image) for image in not_edges]


def cupy_each_class(classes):
    """As the definition reads: for each image and class the mask, its edges, the distance to them."""
    distances = torch.full(classes.shape, -1.0, device=classes.device)
    for image, distance in zip(classes, distances):
        for n in range(N):
            inside = image == n
            padded = torch.nn.functional.pad(inside[None, None].float(), (1, 1, 1, 1), value=1.0)[0, 0]
            surrounded = padded[:-2, 1:-1] * padded[2:, 1:-1] * padded[1:-1, :-2] * padded[1:-1, 2:]
            not_edges = (~inside | (surrounded > 0)).byte()
            result = torch.from_dlpack(cupy_transform(not_edges))
            torch.where(inside, result.to(distance.dtype), distance, out=distance)
    return distances


def topk_each_class(classes, distance_sq):
    selected = torch.zeros(classes.shape, dtype=torch.bool, device=classes.device)
    for image, distance, chosen in zip(classes.flatten(1), distance_sq.flatten(1), selected.flatten(1)):
        for n in range(N):
            pixels = (image == n).nonzero()[:, 0]
            k = int(np.ceil(RATIO * len(pixels)))
            chosen[pixels[distance[pixels].topk(k, largest=False).indices]] = True
    return selected


def sort_of_keys(classes, distance_sq, hashes):
    """Class, distance (21 bits) and hash (32 bits) of every pixel as one integer, sorted image by image."""
    keys = (classes.flatten(1) << 53) | (distance_sq.flatten(1).long() << 32) | hashes
    order = keys.argsort(1)
    image_of, n = torch.arange(B, device=classes.device)[:, None], torch.arange(-1, N, device=classes.device)
    sorted_classes = classes.flatten(1).gather(1, order)
    starts = torch.searchsorted(sorted_classes.contiguous(), n.expand(B, -1).contiguous())
    counts = torch.diff(starts, append=torch.full_like(starts[:, :1], H * W))
    quotas = (counts.double() * RATIO).ceil().long()
    place = torch.arange(H * W, device=classes.device) - starts.gather(1, sorted_classes + 1)
    chosen = (sorted_classes >= 0) & (place < quotas.gather(1, sorted_classes + 1))
    selected = torch.zeros_like(chosen)
    selected[image_of, order] = chosen
    return selected.view(classes.shape)


def hashes_of(seed):
    """SPEC's hash of every pixel of an image, stream 0."""

    def mix(x):
        x = ((x ^ x >> 15) * 0x2C1B3C6D) & 0xFFFFFFFF
        x = ((x ^ x >> 12) * 0x297A2D39) & 0xFFFFFFFF
        return x ^ x >> 15

    key = mix(mix(mix(0x9E3779B9) ^ (seed >> 32 & 0xFFFFFFFF)) ^ (seed & 0xFFFFFFFF))
    return mix(torch.arange(H * W) ^ key).cuda()


# ---- Cases: each yields (row, call, whether it must equal the library's CPU code, that result)


def edge_distance_rows(regime):
    classes = errors(regime)
    expected = native.edge_distance(classes, True)
    on_gpu = classes.cuda()

    call = functools.partial(native.edge_distance, on_gpu, True)
    yield CALLED, call, expected
    yield REPLAYED, graph_of(call), expected
    for dtype in (torch.int32, torch.int8):
        call = functools.partial(native.edge_distance, on_gpu.to(dtype), True)
        yield f"{REPLAYED}, {dtype} maps", graph_of(call), expected
    not_edges = (expected != 0).byte().cuda()
    inside = (classes >= 0).cuda()

    def squared(distances):
        stacked = torch.stack([torch.from_dlpack(x) for x in distances]) if isinstance(distances, list) else distances
        return torch.where(inside, stacked.double().square().round(), -1.0).int().cpu()

    if (expected == 0).flatten(1).any(1).all():  # without a zero CuPy's result means nothing
        yield "CuPy for each image, given edges", lambda: cupy_each_image(not_edges), (expected, squared)
        yield "CuPy for each image and class", lambda: cupy_each_class(on_gpu), (expected, squared)


def select_nearest_rows(regime):
    classes, seed = errors(regime), torch.tensor([5])
    distance_sq = native.edge_distance(classes, True)
    expected = native.select_nearest(classes, distance_sq, RATIO, N, seed)
    inputs = classes.cuda(), distance_sq.cuda()
    call = functools.partial(native.select_nearest, *inputs, RATIO, N, seed.cuda())
    yield CALLED, call, expected
    yield REPLAYED, graph_of(call), expected
    yield "torch.topk for each image and class", lambda: topk_each_class(*inputs), None
    if int(distance_sq.max()) < 2**21:
        hashes = hashes_of(5)
        yield "sort of 64-bit keys", lambda: sort_of_keys(*inputs, hashes), expected


def layers_of(*arguments):
    layers, _ = native.bane_negatives(*arguments)
    return layers


def bane_negatives_rows(regime):
    if regime not in REGIMES:
        return
    sizes = [size for stride in (4, 8, 16, 32) for size in (H // stride, W // stride)]
    predictions = torch.from_numpy(REGIMES[regime]())[:, ::4, ::4]
    logits = torch.nn.functional.one_hot(predictions, N).permute(0, 3, 1, 2).contiguous().bfloat16()
    targets, seed = labels(), torch.tensor([5])
    for at in "layer", "full":
        rest = (N, sizes, RATIO, "bane", at, 255)
        expected, _ = native.bane_negatives(logits, targets, *rest, seed)
        inputs = logits.cuda(), targets.cuda()
        call = functools.partial(layers_of, *inputs, *rest, seed.cuda())
        yield f"{CALLED}, {at}", call, expected
        yield f"{REPLAYED}, {at}", graph_of(call), expected


CASES = {
    f"edge_distance B{B} {H}x{W} N{N}": edge_distance_rows,
    f"select_nearest B{B} {H}x{W} N{N}": select_nearest_rows,
    f"bane_negatives B{B} {H}x{W} N{N}, strides 4-32": bane_negatives_rows,
}


def equal(result, expected):
    if isinstance(expected, tuple):
        expected, convert = expected
        return torch.equal(convert(result), expected)
    if isinstance(expected, list):
        return all(torch.equal(got.cpu(), want) for got, want in zip(result, expected, strict=True))
    return torch.equal(result.cpu(), expected)


def measure(repeat_ms):
    from triton.testing import do_bench

    for case, rows_of in CASES.items():
        for regime in (*REGIMES, "one wrong class everywhere"):
            measured = []
            for row, call, expected in rows_of(regime):
                try:
                    result = call()
                except ImportError as missing:
                    print(f"{row}: not measured, {missing}", file=sys.stderr)
                    continue
                if expected is not None and not equal(result, expected):
                    sys.exit(f"{case}, {regime}: {row} differs from the CPU, nothing was written")
                low, median, high = do_bench(call, rep=repeat_ms, quantiles=[0.25, 0.5, 0.75])
                measured.append({"row": row, "case": case, "regime": regime, "median_ms": median, "iqr_ms": high - low})
                print(f"{case:45s} {regime:28s} {row:45s} {1e3 * median:10.1f} us", flush=True)
            peers = [row["median_ms"] for row in measured if not row["row"].startswith(CALLED)]
            for row in measured:
                row["ratio_to_fastest_peer"] = f"{min(peers) / row['median_ms']:.3g}" if peers else ""
            yield from measured


def write(rows):
    folder = pathlib.Path(__file__).parent
    git = ["git", "-C", folder, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    gpu = torch.cuda.get_device_name()
    path = folder / "results" / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.csv"
    others = []
    if path.exists():
        with path.open(newline="") as file:
            others = [row for row in csv.DictReader(file) if row["case"] not in CASES]
    facts = {"threads": "", "cpu": gpu, "torch": torch.__version__, "commit": commit}
    rows = [row | facts | {name: f"{row[name]:.4f}" for name in ("median_ms", "iqr_ms")} for row in rows]
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(others + rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat-ms", type=int, default=200, help="time spent on each row (default: %(default)s)")
    repeat_ms = parser.parse_args().repeat_ms
    if native.status("cuda") != "ok":
        sys.exit(f"bench_edt_gpu.py: {native.status('cuda')}")
    rows = []
    for row in measure(repeat_ms):
        rows.append(row)
        write(rows)  # a run that ends early keeps what it has measured
    print(f"wrote {len(rows)} rows")


if __name__ == "__main__":
    main()
