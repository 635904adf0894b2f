"""The CamVid study: the paper's protocol as far as it goes without ImageNet weights, arm by arm and seed by seed.

    python -m benchmarks.train_camvid --root FOLDER --out FOLDER --minutes 8

trains what is not yet in OUT/camvid.csv, leaves a checkpoint when the time is over, and goes on from it when it is
called again. Without a GPU it runs a shortened protocol, a test of itself: a small network at a quarter of the
resolution. `python -m benchmarks.report` makes docs/camvid.md of the rows.

All arms and seeds are 486000 iterations of the full protocol: 13.5 hours of a GPU at 0.1 s each. Into a quarter of an
hour, in two calls, fit the arms of table 6, with three seeds and at the paper's resolution, where one of their 18000
iterations takes at most 40 ms:

    --arms components --network small --iterations 1500
"""

import argparse
import contextlib
import hashlib
import importlib.util
import pathlib
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from filelock import FileLock, Timeout

from benchmarks import results
from benchmarks.camvid import arms, rows, training
from benchmarks.camvid.networks import NETWORKS, Absent
from benchmarks.camvid.rows import Result
from contextrast_kernels import measure
from contextrast_kernels.demo import scenes

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


def libraries() -> str:
    """Those of network and augmentation that are installed, with their versions."""
    names = ("timm", "torchvision", "kornia")
    return ", ".join(f"{name} {version}" for name in names if (version := results.version(name)))


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_camvid",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=pathlib.Path, required=True, help="CamVid's folder in SegNet's layout")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FOLDER", help=f"where {rows.FILE} is kept")
    parser.add_argument("--keep", type=pathlib.Path, metavar="FOLDER", help="where checkpoints are kept; default: OUT")
    parser.add_argument(
        "--arms", nargs="+", default=list(arms.TABLES), metavar="NAME", help="arms or tables; default: all"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after this, with a checkpoint; default: 8")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--pictures",
        action="store_true",
        help="of Contextrast and the first seed, also figure 5 and the negatives, in OUT",
    )
    for name, kind, least, most in NUMBERS:
        parser.add_argument(f"--{name}", type=kind, help=f"{least} to {most}; default: the protocol's")
    parser.add_argument("--network", choices=NETWORKS, help="default: hrnet_w18 on a GPU, small without one")
    options = parser.parse_args(arguments)
    try:
        options.arms = arms.chosen(options.arms)
    except ValueError as error:
        parser.error(f"--arms: {error}")
    if len(set(options.seeds)) < len(options.seeds) or not all(0 <= seed < 2**31 for seed in options.seeds):
        parser.error(f"--seeds: expected different numbers from 0 to {2**31 - 1}, got {options.seeds}")
    if not 0 <= options.minutes <= 10**5:
        parser.error(f"--minutes: expected 0 to 100000, got {options.minutes}")
    for name, _, least, most in NUMBERS:
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name}: expected {least} to {most}, got {value}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if options.pictures and importlib.util.find_spec("matplotlib") is None:
        parser.error("--pictures needs matplotlib, which is not installed: pip install matplotlib, or leave it out")
    for name in ("out", "keep"):
        folder = getattr(options, name)
        if folder is not None and folder.exists() and not folder.is_dir():
            parser.error(f"--{name}: expected a folder, got the file {folder}")
    options.keep = options.keep or options.out
    return parser, options


NUMBERS = (("height", int, 32, 720), ("iterations", int, 1, 10**6), ("batch", int, 1, 256))
LOCK = ".camvid.lock"
KEPT = "what is kept is the last tenth that was finished"
NOTHING_KEPT = "nothing of it is kept, as its first tenth was not finished"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is left. Exit status: 0; 1 if a training failed or nothing can be written; 2 for unusable arguments or
    data; 130 after Ctrl-C."""
    parser, options = parse(arguments)
    ends = time.monotonic() + 60 * options.minutes
    numbers = {name: getattr(options, name) for name in ("network", *(name for name, *_ in NUMBERS))}
    setting = training.FULL if options.device == "cuda" else training.SHORTENED
    setting = replace(setting, **{name: value for name, value in numbers.items() if value is not None})
    with contextlib.ExitStack() as locks:
        try:
            NETWORKS[setting.network](2)
            data = scenes.CamVid(options.root, setting.height, device=options.device)
            for folder in (options.out, options.keep):  # what cannot be written is said before a training, not after it
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            for folder in {options.out.resolve(), options.keep.resolve()}:
                locks.enter_context(FileLock(folder / LOCK, timeout=0))
            known = {row.measured for row in results.read(options.out / rows.FILE, Result)}
        except Timeout as error:
            parser.error(f"{error.lock_file}: another call trains here; wait for it, or give other --out and --keep")
        except (results.SchemaError, Absent, scenes.DataError, OSError) as error:
            parser.error(str(error))
        if min(data.size) < training.MULTIPLE:
            parser.error(f"--height: expected frames of at least 32 x 32 px, got {data.size[0]} x {data.size[1]}")
        classes, least = int((data.validation[1].unique() < len(data.classes)).sum()), max(rows.NEAREST) + 1
        if classes < least:
            parser.error(f"--root: expected validation frames of at least {least} classes, got {classes}")
        augment, _ = scenes.augmentation()
        environment = results.environment(options.device) | {"libraries": libraries()}
        if not environment["commit"]:
            print("these rows will name no commit, as git knows none here: set CONTEXTRAST_COMMIT", file=sys.stderr)
        study = training.Study(setting, data, "plain" if augment is scenes.plain else "kornia", augment, environment)
        command = sys.argv[1:] if arguments is None else arguments
        options.command = shlex.join(["python", "-m", "benchmarks.train_camvid", *map(str, command)])
        return train(study, options, known, ends)


def train(study: training.Study, options: argparse.Namespace, known: set[tuple], ends: float) -> int:
    """One training after another until ``ends``, but for those known. Says what is left; returns the exit status."""
    path, setting = options.out / rows.FILE, study.setting

    def checkpoint(arm: arms.Arm, seed: int) -> pathlib.Path:
        # By what the arm is, too: one whose options were changed begins anew.
        what = study.blank(arm, seed).measured, arm, setting
        return options.keep / f"{arm.name}-seed-{seed}-{hashlib.sha1(repr(what).encode()).hexdigest()[:8]}.pt"

    def failure(arm: arms.Arm, seed: int) -> pathlib.Path:
        return checkpoint(arm, seed).with_suffix(".failed")

    left = [(arm, seed) for group in options.arms for seed in options.seeds for arm in group]
    for arm, seed in left:
        if study.blank(arm, seed).measured in known:
            checkpoint(arm, seed).unlink(missing_ok=True)  # of a call that ended between row and deletion
    left = [(arm, seed) for arm, seed in left if study.blank(arm, seed).measured not in known]
    left.sort(key=lambda job: failure(*job).exists())  # what failed in an earlier call must not use up every later one
    blank = study.blank(arms.ARMS["baseline"], 0)
    print(
        f"{blank.protocol} protocol: {setting.network}, {blank.height} x {blank.width} px, batch {setting.batch}, "
        f"{setting.iterations} iterations, {blank.precision}, augmentation: {study.augmentation}, {blank.device}",
        flush=True,
    )
    failed, status = [], 0
    while left and time.monotonic() < ends:
        run, (arm, seed) = None, left[0]  # the last training's memory is free before the next begins
        name = f"{arm.name}, seed {seed}"
        try:
            run = training.Training(arm, seed, study)
            if checkpoint(arm, seed).exists():
                run.resume(checkpoint(arm, seed))
            with progress(name, run) as told_of:
                row = run.advance(ends, checkpoint(arm, seed), told_of)
            if row is None:
                print(f"{name}: stopped after {run.iteration} of {setting.iterations} iterations", flush=True)
                break
            results.record(path, row)
            if options.pictures and arm.loss == "contextrast" and seed == options.seeds[0] and row.status == "ok":
                for what, figure in run.pictures().items():
                    figure.savefig(options.out / f"{arm.name}-{what}.png", dpi=110)
        except KeyboardInterrupt:
            print(f"{name}: interrupted; {KEPT if checkpoint(arm, seed).exists() else NOTHING_KEPT}", flush=True)
            status = 130
            break
        except OSError as error:  # what cannot be written now, the next training cannot write either
            print(f"{name}: {error}", flush=True)
            status = 1
            break
        except (RuntimeError, ValueError, training.CheckpointError) as error:  # out of memory, say: go on without it
            print(f"{name} failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}", flush=True)
            with contextlib.suppress(OSError):
                failure(arm, seed).touch()
            failed.append(left.pop(0))
            if not measure.answers(study.device):
                print("the device answers nothing any more in this process")
                break
            continue
        for path_of in (checkpoint, failure):
            path_of(arm, seed).unlink(missing_ok=True)
        left.pop(0)
        print(f"{name}: {told(row)}", flush=True)

    left += failed
    if left:
        states = (
            ", failed" if failure(*job).exists() else ", begun" if checkpoint(*job).exists() else "" for job in left
        )
        print("left: " + "; ".join(f"{arm.name} {seed}{state}" for (arm, seed), state in zip(left, states)))
        print(f"go on with: {options.command}")
    again = ", to be tried again" if failed else ""
    print(f"{len(failed)} trainings failed{again}; {f'{len(left)} rows left' if left else 'complete'}")
    return status or (1 if failed else 0)


@contextlib.contextmanager
def progress(name: str, run: training.Training) -> Iterator[Callable[[int], object]]:
    """A bar in a terminal, where there is tqdm; gives what it is told by, in iterations done since."""
    if tqdm is None:
        yield lambda done: None
    else:
        total = run.setting.iterations
        with tqdm(total=total, initial=run.iteration, desc=name, unit="it", disable=None) as bar:
            yield bar.update


def told(row: Result) -> str:
    if row.status != "ok":
        return row.status
    time = f", {row.median_step_ms:.1f} ms a step" if row.median_step_ms else ""
    return f"mIoU {row.miou:.3f}, within 5 px of a boundary {row.trimap_5:.3f}{time}"


if __name__ == "__main__":
    sys.exit(main())
