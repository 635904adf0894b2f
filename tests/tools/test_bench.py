"""``python -m contextrast_kernels bench``: a table for given shapes, or a clear error."""

from dataclasses import replace

import pytest
import torch

import contextrast_kernels as ck
from contextrast_kernels import bench, cases
from contextrast_kernels.__main__ import main
from contextrast_kernels.backend import _requested

SMALL = ("--shape", "2,64,96", "--classes", "5", "--channels", "8", "--seconds", "0.01")


def rows_of(text):
    return {cells[0]: cells[1:] for line in text.splitlines() if (cells := [c.strip() for c in line.split("|")[1:-1]])}


@pytest.mark.parametrize("more", [(), ("--layers", "deeplab", "--regime", "20 % errors", "--base-rate", "0.1")])
def test_bench_prints_a_table_for_given_shapes(capsys, more):
    assert main(["bench", *SMALL, *more]) == 0
    captured = capsys.readouterr()
    rows = rows_of(captured.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert set(bench.implementations(device, cases.CASES["camvid"])) <= set(rows)
    forward, both, faster, memory, loss_error, gradient_error = rows["reference"]
    assert forward.endswith(" ms") and both.endswith(" ms") and faster == "1.0" and memory.endswith(" MiB")
    assert float(memory.removesuffix(" MiB")) > 0
    assert 0 <= float(loss_error) < 1e-2 and 0 < float(gradient_error) < 1e-2
    assert "B 2, 64 x 96, N 5, D 8" in captured.out


def test_progress_goes_to_stderr(monkeypatch, capsys):
    """A large case on a CPU takes minutes. Each line is there before what it announces begins."""
    order = []
    monkeypatch.setattr(bench, "_say", lambda what: order.append(what))
    for name in ("truth", "time_calls"):
        function = getattr(bench.measure, name)
        monkeypatch.setattr(bench.measure, name, lambda *a, f=function, n=name: order.append(n) or f(*a))
    assert main(["bench", *SMALL]) == 0
    assert "inputs" in order[0]
    assert order[1:3] == ["the reference in float64, for comparison", "truth"]
    names = list(
        bench.implementations(torch.device("cuda" if torch.cuda.is_available() else "cpu"), cases.CASES["camvid"])
    )
    assert [line.split(":")[0] for line in order[3:]] == [
        word for name in names for word in (name, name, "time_calls", "time_calls")
    ]
    monkeypatch.undo()
    bench._say("one word")
    assert capsys.readouterr().err == "bench: one word\n"


def test_unsupported_sizes_are_not_listed_as_fused(monkeypatch):
    monkeypatch.setattr(ck, "available", lambda: {"triton": "ok", "native": "ok", "reference": "ok"})
    case, gpu = cases.CASES["camvid"], torch.device("cuda")
    assert list(bench.implementations(gpu, case)) == ["triton + native", "reference"]
    for beyond in ({"num_classes": 257}, {"channels": 1025}):
        assert list(bench.implementations(gpu, replace(case, **beyond))) == ["native + reference", "reference"]


def test_a_wrong_result_is_reported_with_status_1(capsys, monkeypatch):
    exact = ck.contextrast_loss

    def broken(*args, **options):
        return exact(*args, **options) * (1.0 if _requested() == "reference" else 1.01)

    monkeypatch.setattr(ck, "contextrast_loss", broken)
    monkeypatch.setattr(bench, "implementations", lambda *_: {"broken": "auto", "reference": "reference"})
    assert main(["bench", *SMALL, "--dtype", "float32"]) == 1
    out = capsys.readouterr().out
    assert "the result differs from the reference: broken: relative error of the loss: 1.0e-02" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape", "8,512"], "--shape: expected B,H,W"),
        (["--shape", "8,512,x", "--classes", "3"], "--shape: expected B,H,W"),
        (["--shape", "0,512,512", "--classes", "3"], "--shape: expected at least one image"),
        (["--shape", "1,4,512", "--classes", "3"], "--shape: expected at least one image"),
        (["--shape", "1,512,512"], "--classes: expected the number of classes"),
        (["--shape", "1,512,512", "--classes", "1"], "--classes: expected at least 2"),
        (["--classes", "19"], "--classes: expected --shape"),
        (["--case", "camvid", "--classes", "19"], "--classes: expected --shape"),
        (["--dtype", "float32"], "expected --shape B,H,W with --classes N, or --case"),
        (["--case", "camvid", "--channels", "0"], "--channels: expected at least 1"),
        (["--plan", "--channels", "2000"], "--channels: expected 1 to 1024"),
        (["--plan", "--shape", "2,64,64", "--classes", "257"], "--classes: expected 2 to 256"),
        (["--case", "camvid", "--regime", "tired"], "--regime: expected one of"),
        (["--case", "camvid", "--base-rate", "nan"], "--base-rate: expected 0 to 1"),
        (["--case", "camvid", "--seconds", "0"], "--seconds: expected above 0"),
        ([*SMALL, "--frames", "/nowhere"], "--frames: no folder"),
        (["--shape", "2,64,96", "--case", "camvid"], "not allowed with"),
        (["--case", "kitti"], "invalid choice"),
    ],
)
def test_bad_input_is_an_error_with_status_2(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.out == ""


def test_too_little_memory_is_a_clear_error(capsys, monkeypatch):
    def no_memory(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr(ck, "contextrast_loss", no_memory)
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *SMALL])
    assert "needs more memory than is available" in capsys.readouterr().err


def test_bench_without_arguments_prints_its_help(capsys):
    assert main(["bench"]) == 2
    assert "--shape 4,512,512 --classes 21" in capsys.readouterr().err
