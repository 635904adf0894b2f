"""``python -m contextrast_kernels bench --plan``: what the fused loss would launch and move, from shapes alone."""

import argparse

import torch

# Training settings of the paper: batch, crop, classes.
CASES = {
    "cityscapes": (8, (512, 1024), 19),
    "ade20k": (12, (512, 512), 150),
    "camvid": (16, (360, 480), 11),
}
STRIDES = (4, 8, 16, 32)
DTYPES = ("bfloat16", "float16", "float32", "float64")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m contextrast_kernels bench", description=__doc__)
    parser.add_argument("--plan", action="store_true", required=True, help="list launches and bytes; nothing is run")
    parser.add_argument(
        "--case", choices=CASES, default="cityscapes", help="the paper's settings (default: cityscapes)"
    )
    parser.add_argument("--channels", type=int, default=256, help="D of the embeddings (default: 256)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the features (default: bfloat16)")
    parser.add_argument("--layout", choices=("nchw", "channels_last"), default="nchw")
    parser.add_argument("--base-rate", type=float, default=0.0, help="share of base pixels among the negatives")
    options = parser.parse_args(arguments)
    if not 1 <= options.channels <= 1024:
        parser.error(f"--channels: expected 1 to 1024, got {options.channels}")
    if not 0 <= options.base_rate <= 1:
        parser.error(f"--base-rate: expected 0 to 1, got {options.base_rate}")
    try:
        from contextrast_kernels.kernels import contextrast
    except ImportError as error:
        parser.error(f"the plan is read off the Triton kernels, which need Triton ({error})")

    batch, (height, width), num_classes = CASES[options.case]
    sizes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    dtype = getattr(torch, options.dtype)
    launches = contextrast.plan(
        batch, sizes, options.channels, num_classes, dtype, layout=options.layout, base_rate=options.base_rate
    )
    features = batch * options.channels * sum(h * w for h, w in sizes) * dtype.itemsize
    print(
        f"{options.case}: batch {batch}, {height} x {width}, N {num_classes}, D {options.channels}, {options.dtype}, "
        f"{options.layout}, base rate {options.base_rate:g}; features {features / 1e6:.1f} MB.\n"
        "Bytes that each launch moves at least once, by its grid and tiles; nothing was run.\n"
    )
    print(f"{'kernel':<28}{'programs':>10}{'reads MB':>11}{'writes MB':>11}{'x features':>12}")
    for launch in launches:
        programs = 1
        for axis in launch.grid:
            programs *= axis
        reads, writes, moved = launch.reads / 1e6, launch.writes / 1e6, (launch.reads + launch.writes) / features
        print(f"{launch.kernel.__name__:<28}{programs:>10}{reads:>11.2f}{writes:>11.2f}{moved:>12.3f}")
    total = sum(launch.reads + launch.writes for launch in launches)
    print(
        f"\n{len(launches)} launches, {total / 1e6:.1f} MB: {total / (4 * features):.2f} x the floor of 4 x features "
        "(three reads, one write).\nBeside these come fills of the sums with zero, and the launches of the negatives."
    )
    return 0
