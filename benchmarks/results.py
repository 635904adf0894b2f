"""The schema of all measurements, ``benchmarks/results/<device>.csv``: a row says what was measured, how, and where.

An empty cell means not measured or not applicable; nothing is filled in afterwards. Two files in that folder hold
accuracies of trainings and have schemas of their own: ``demo.csv``, and ``camvid.csv`` (``camvid/rows.py``).
"""

import csv
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import get_args

import torch

from contextrast_kernels.cases import Case

FOLDER = pathlib.Path(__file__).parent / "results"
OTHER_SCHEMA = ("demo.csv", "camvid.csv")


class Absent(Exception):
    """Something that a row needs is missing: a library, a checkout, a device. The message is one sentence."""


@dataclass(frozen=True)
class Row:
    """One measurement."""

    what: str
    """The operation: "contextrast_loss forward+backward", "edge_distance"."""
    by: str
    """Whose, or which implementation: "triton", "reference", "torch.compile", "edt multi-label"."""
    mode: str = "eager"
    """"eager", "graph" (a replayed CUDA graph), or what else distinguishes the call, such as the sampling."""

    case: str = ""
    regime: str = ""
    batch: int | None = None
    height: int | None = None
    width: int | None = None
    classes: int | None = None
    channels: int | None = None
    strides: str = ""
    """The strides of the layers, as "4-8-16-32"."""
    dtype: str = ""
    """The type of the features, or of the labels if there are no features."""
    layout: str = ""
    threads: int | None = None
    """On a CPU."""

    status: str = "ok"
    """"ok": validated, then measured. "untimed": ran and was validated where times mean nothing. Else "failed: " or
    "absent: " and the reason."""
    exact: str = ""
    """For a peer: "yes" if its result equals the reference's, or "no" if the note says what it is, or what it computes
    instead."""
    median_ms: float | None = None
    iqr_ms: float | None = None
    launches: int | None = None
    """Kernels, fills and copies on the device."""
    syncs: int | None = None
    """Times that the host waits for the device."""
    peak_mib: float | None = None
    """The most memory that torch holds during the call, above its inputs and results."""
    plan_mb: float | None = None
    """10⁶ bytes that the planned launches move at most. Not all similarities of negatives are needed."""
    copy_gb_s: float | None = None
    """Bytes per second, read and written, of a large copy in the same run."""
    note: str = ""

    device: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""

    @property
    def percent_of_copy(self) -> float | None:
        """The plan's bytes over the median time, in percent of the copy's bandwidth."""
        if self.median_ms and self.plan_mb and self.copy_gb_s:
            return 100 * self.plan_mb / self.median_ms / self.copy_gb_s
        return None

    @property
    def measured(self) -> tuple:
        """The columns that identify a row: all but the outcome."""
        return tuple(getattr(self, name) for name in IDENTITY)

    def flaw(self) -> str | None:
        """What is wrong with the row, as a sentence; None if nothing is."""
        if not self.what or not self.by or not self.device or not self.torch:
            return "expected what, by, device and torch to be filled."
        if not STATUS.fullmatch(self.status):
            return f"status: expected ok, untimed, 'failed: why' or 'absent: why', got {self.status!r}."
        if (self.status == "ok") == (self.median_ms is None):
            return f"expected a time where the status is ok, none elsewhere, got {self.median_ms} and {self.status!r}."
        if (self.median_ms is None) != (self.iqr_ms is None):
            return "expected a median with its spread, or neither."
        return None


IDENTITY = (
    *("what", "by", "mode", "case", "regime", "batch", "height", "width", "classes", "channels", "strides", "dtype"),
    *("layout", "threads", "device", "torch", "commit"),
)
COLUMNS = tuple(field.name for field in fields(Row))
STATUS = re.compile(r"ok|untimed|(failed|absent): .+", re.DOTALL)


def of_case(case: Case) -> dict:
    """The columns that a case fills."""
    return {
        "case": case.name,
        "regime": case.regime,
        "batch": case.batch,
        "height": case.height,
        "width": case.width,
        "classes": case.num_classes,
        "channels": case.channels,
        "strides": "-".join(map(str, case.strides)),
        "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout,
    }


NOT_YET = "Not measured yet."


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    if not lines:
        return NOT_YET
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


# ---------------------------------------------------------------------------------------------------------- the machine


def environment(device: str | torch.device = "cpu") -> dict:
    """The columns that name device, driver, versions and commit. A commit with local changes ends in "+"."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "driver": driver() if on_gpu else "",
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
    }


def driver() -> str:
    """The driver's version. It is never empty, because a row with a driver counts as one of a GPU."""
    version = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
    return version or "unknown"


def cpu_name() -> str:
    try:
        return re.search(r"model name\s*:\s*(.*)", pathlib.Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this checkout; without a repository, the value of CONTEXTRAST_COMMIT."""
    root = pathlib.Path(__file__).parents[1]
    head = _output("git", "-C", str(root), "rev-parse", "--short=7", "HEAD")
    changed = _output(
        "git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results"
    )
    return (head + "+" if changed else head) or os.environ.get("CONTEXTRAST_COMMIT", "")


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def version(library: str) -> str:
    """The installed version, or "". Nothing is imported: a library that does not fit torch may raise any error."""
    for name in (library, f"pytorch-{library}"):  # as torch's nightly builds call Triton
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return ""


def path_of(device: str, folder: pathlib.Path = FOLDER) -> pathlib.Path:
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.csv"


# ------------------------------------------------------------------------------------------------------------- the file


class SchemaError(Exception):
    """A results file does not follow the schema; the message is one sentence that names file and line."""


def read(path: pathlib.Path, kind: type = Row) -> list:
    """The rows of a file, validated; none if there is no file yet. ``kind``: a dataclass with ``flaw``, as Row."""
    if not path.exists():
        return []
    columns = [field.name for field in fields(kind)]
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        try:
            found = table.fieldnames
            if not found:
                raise SchemaError(f"{path}: expected a line of columns, got an empty file: delete it.")
            if found != columns:
                raise SchemaError(f"{path}: expected the columns {', '.join(columns)}, got {', '.join(found)}.")
            return [_parsed(kind, cells, f"{path}, line {table.line_num}") for cells in table]
        except (UnicodeDecodeError, csv.Error) as error:
            raise SchemaError(f"{path}: expected comma-separated text, got another kind of file ({error}).") from error


def read_all(folder: pathlib.Path = FOLDER) -> list[Row]:
    return [row for path in sorted(folder.glob("*.csv")) if path.name not in OTHER_SCHEMA for row in read(path)]


def record(path: pathlib.Path, row) -> None:
    """Write a row at once, so that a run that ends early keeps what it has measured. The row replaces an earlier one of
    the same measurement."""
    earlier = [known for known in read(path, type(row)) if known.measured != row.measured]
    write(path, [*earlier, row], type(row))


def write(path: pathlib.Path, rows: list, kind: type = Row) -> None:
    """Replaces the file by these rows."""
    cells = [_cells(row) for row in rows]
    for number, of_row in enumerate(cells):
        _parsed(kind, of_row, f"{path}, row {number}")
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".csv.new")
    with half.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in fields(kind)], lineterminator="\n")
        table.writeheader()
        table.writerows(cells)
    half.replace(path)


def _cells(row) -> dict[str, str]:
    def text(value) -> str:
        if value is None:
            return ""
        return f"{value:.5g}" if isinstance(value, float) else " ".join(str(value).split())

    return {name: text(value) for name, value in asdict(row).items()}


def _parsed(kind: type, cells: dict, where: str):
    types, values = {field.name: field.type for field in fields(kind)}, {}
    for name, text in cells.items():
        if name not in types or text is None:
            raise SchemaError(f"{where}: expected {len(types)} cells.")
        try:
            if types[name] is str:
                values[name] = text
            else:
                values[name] = (
                    None if text == "" else (int if int in (types[name], *get_args(types[name])) else float)(text)
                )
        except ValueError:
            raise SchemaError(f"{where}: {name}: expected a number, got {text!r}.") from None
    row = kind(**values)
    flaw = row.flaw()
    if flaw:
        raise SchemaError(f"{where}: {flaw}")
    return row
