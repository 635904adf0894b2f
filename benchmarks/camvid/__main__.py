"""The CamVid study, training by training.

    python -m benchmarks.camvid --root FOLDER --out FOLDER

trains what OUT/camvid.csv lacks, in the order of ``arms.plan``, and appends a row for each finished training. A call
that is stopped, by --minutes, Ctrl-C or a signal, is taken up by the next one from a checkpoint at most two minutes
old. All trainings in a file are of one commit. ``python -m benchmarks.report`` generates docs/camvid.md from them.
"""

import argparse
import contextlib
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence

import torch

try:
    from filelock import FileLock, Timeout
    from tqdm import tqdm

    from benchmarks.camvid import data, training
except ImportError as error:
    sys.exit(f'the CamVid study needs {error.name} ({error}). Install it: pip install -e ".[study]".')
from benchmarks import results
from benchmarks.camvid import arms
from benchmarks.camvid.rows import FILE, Result


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.camvid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=pathlib.Path, required=True, help="CamVid's folder in SegNet's layout")
    parser.add_argument("--out", type=pathlib.Path, required=True, help=f"folder of {FILE} and the checkpoints")
    parser.add_argument("--protocol", choices=arms.PROTOCOLS, help="train this one; default: the study's, in order")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"{', '.join(arms.ARMS)}, or components")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="with --protocol; default: 0")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this, with a checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    options = parser.parse_args(arguments)
    wanted = [name for given in options.arms or () for name in (arms.COMPONENTS if given == "components" else [given])]
    unknown = [name for name in wanted if name not in arms.ARMS]
    if unknown:
        parser.error(f"--arms: expected some of {', '.join(arms.ARMS)} or components, got {unknown[0]!r}")
    if options.seeds and not all(0 <= seed < 2**31 for seed in options.seeds):
        parser.error(f"--seeds: expected numbers from 0 to {2**31 - 1}, got {options.seeds}")
    if not options.minutes >= 0:
        parser.error(f"--minutes: expected a number of at least 0, got {options.minutes}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no GPU. Leave it out or say cpu.")
    if options.protocol:
        seeds = options.seeds or [0]
        names = wanted or arms.COMPONENTS
        jobs = [(arms.PROTOCOLS[options.protocol], arms.ARMS[name], seed) for seed in seeds for name in names]
    else:
        jobs = [
            job
            for job in arms.plan()
            if (not wanted or job[1].name in wanted) and (not options.seeds or job[2] in options.seeds)
        ]
    options.jobs = list(dict.fromkeys((protocol.name, arm.name, seed) for protocol, arm, seed in jobs))
    return parser, options


def known(path: pathlib.Path, where: dict, device: torch.device) -> list[Result]:
    """Read the rows of earlier calls. SchemaError: they are of another study, another commit, or not of this GPU."""
    rows = results.read(path, Result)
    trained = [row for row in rows if row.protocol != "timing"]
    elsewhere = sorted({row.device for row in trained} - {where["device"]})
    if device.type == "cuda" and elsewhere:
        raise results.SchemaError(
            f"{path}: expected rows of {where['device']}, got rows of {elsewhere[0]}. Give another --out for this GPU."
        )
    commit = where["commit"]
    other = sorted({row.commit for row in trained} - {commit})
    if other:
        raise results.SchemaError(
            f"{path}: expected rows of this checkout's commit {commit}, got rows of {', '.join(other)}. "
            f"Train in a checkout of that commit (git worktree add FOLDER {other[0]}), or give another --out."
        )
    return rows


def environment(device: torch.device) -> dict:
    found = results.environment(device)
    libraries = ", ".join(f"{name} {results.version(name)}" for name in ("timm", "torchvision"))
    return {name: found[name] for name in ("device", "torch", "commit")} | {"libraries": libraries}


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0; 1 if a training failed or nothing can be written; 2 for bad arguments or data; 130 after Ctrl-C."""
    parser, options = parse(arguments)
    ends = time.monotonic() + 60 * options.minutes
    if options.device == "cpu":
        torch.set_num_threads(1)  # the rounding of sums depends on the number of threads
    path, device = options.out / FILE, torch.device(options.device)
    with contextlib.ExitStack() as held:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=options.out).close()  # fails now if nothing can be written
            held.enter_context(FileLock(options.out / ".lock", timeout=0))
            where = environment(device)
            done = {row.measured for row in known(path, where, device)}
            left = [job for job in options.jobs if job not in done]
            if left:  # fails now if weights are missing, before the frames are read
                protocol = arms.PROTOCOLS[left[0][0]]
                training.NETWORKS[protocol.network](2, protocol.pretrained)
            print(f"{len(options.jobs) - len(left)} of {len(options.jobs)} trainings done, commit {where['commit']}")
            return train(left, path, where, device, options.root, ends)
        except Timeout:
            parser.error(f"--out: another call trains into {options.out}. Wait for it, or give another folder.")
        except (results.SchemaError, results.Absent, data.DataError, training.CheckpointError) as error:
            parser.error(str(error))
        except OSError as error:
            print(f"cannot continue: {error}. The last checkpoint and all rows are kept.", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted. The last checkpoint and all rows are kept.", file=sys.stderr)
            return 130


def train(
    left: Iterable[tuple[str, str, int]],
    path: pathlib.Path,
    where: dict,
    device: torch.device,
    root: pathlib.Path,
    ends: float,
) -> int:
    """Train one after the other until ``ends``."""
    frames, read, status = None, None, 0
    for name, arm, seed in left:
        if time.monotonic() >= ends:
            return status
        protocol = arms.PROTOCOLS[name]
        if read != protocol.size:
            train_frames, validation = (
                tuple(part.to(device) for part in data.frames(root, split, protocol.size)) for split in ("train", "val")
            )
            frames, read = training.Frames(train_frames, validation, where, device), protocol.size
        weight = arms.ARMS[arm].weight
        weight = arms.alpha(known(path, where, device)) if weight is None else weight
        checkpoint = path.parent / f"{name}-{arm}-{seed}.pt"
        try:
            run = training.Training(protocol, arms.ARMS[arm], seed, weight, frames)
            if checkpoint.exists():
                run.resume(checkpoint)
            with tqdm(
                total=protocol.iterations, initial=run.iteration, desc=f"{name} {arm} {seed}", disable=None
            ) as bar:
                row = run.run(checkpoint, ends, bar.update)
        except RuntimeError as error:  # out of memory, say: the other trainings may still run
            print(f"{name} {arm} {seed} failed: {str(error).partition(chr(10))[0]}", file=sys.stderr)
            status = 1
            continue
        if row is not None:
            results.record(path, row)
            checkpoint.unlink(missing_ok=True)
            told = f"mIoU {row.miou:.4f}" if row.miou is not None else f"{row.status}"
            print(f"{name} {arm} {seed}: {told}, {row.cpu_seconds or 0:.0f} CPU s", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
