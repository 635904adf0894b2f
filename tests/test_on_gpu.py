"""benchmarks/on_gpu.sh: what it runs, what it says, and that it goes on where it stopped. Python and the tools are
stood in for, so that it is the script that is tested; the slow test runs the real ones on small cases."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import pytest

from benchmarks import peers, results, run

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
  *"import sys, torch"*) exit "$NO_GPU" ;;
  *xdist*) exit 1 ;;
  *doctor*) echo broken; exit 3 ;;
  *"--parts loss"*) touch "$RESULTS/a-gpu.csv"; echo complete ;;
  *"--parts parts"*) echo "2 rows left" ;;
  *"--parts edt"*) sleep 60 ;;
  *"--parts step"*) echo "1 rows failed; 3 rows left"; exit 1 ;;
  *) echo fine ;;
esac
"""
QUICK = ("build/doctor", "test", "bench/host", "bench/loss", "bench/parts", "bench/step", "train/demo")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


class Machine:
    """A machine whose python3 does nothing but say that it was called."""

    def __init__(self, folder, gpu):
        self.out, self.keep, self.calls = folder / "out", folder / "keep", folder / "calls"
        tools = folder / "bin"
        tools.mkdir()
        for name, text in (("python3", PYTHON), ("compute-sanitizer", "#!/usr/bin/env bash\nexit 0\n")):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.environment = os.environ | {
            **{
                "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
                "CALLS": str(self.calls),
                "NO_GPU": str(int(not gpu)),
            },
            **{
                "OUT": str(self.out),
                "KEEP": str(self.keep),
                "RESULTS": str(self.keep / "results"),
                "PYTHON": "python3",
                "CONTEXTRAST_COMMIT": "0123456",
            },
        }

    def run(self, *arguments, script=SCRIPT, **environment):
        self.calls.write_text("")
        done = subprocess.run(
            [script, *arguments], env=self.environment | environment, capture_output=True, text=True, timeout=120
        )
        states = {}
        for line in done.stdout.splitlines():
            if " s  " in line and "/" in line.split()[0]:
                states[line.split()[0]] = line.split(" s  ")[1]
        return done, states


@pytest.fixture
def without_gpu(tmp_path):
    return Machine(tmp_path, gpu=False)


@pytest.fixture
def with_gpu(tmp_path):
    return Machine(tmp_path, gpu=True)


def tree():
    return subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout


def test_a_failing_step_stops_nothing_and_a_finished_one_is_not_repeated(without_gpu):
    before = tree()
    done, states = without_gpu.run(*QUICK)
    assert done.returncode == 1
    assert states == {
        "build/doctor": "FAILED (3)",
        "test/native": "not here: needs a GPU",
        "test/kernels": "ok",
        "bench/host": "ok",
        "bench/loss": "ok",
        "bench/parts": "2 rows left",
        "bench/step": "FAILED (1): 1 rows failed; 3 rows left",
        "test/suite": "ok",
        "test/slow": "not here: needs a GPU; make test-all runs the long sweeps without one",
        "train/demo": "ok",
    }
    assert "broken" in done.stdout  # the end of a failing step's log
    *_, left, failed = done.stdout.splitlines()
    assert left == "left: bench/parts bench/step; run the same command again"
    assert failed.startswith("failed: build/doctor bench/step; logs are in ")
    assert "--parts loss --tiny --cases camvid" in without_gpu.calls.read_text()
    assert {path.name for path in without_gpu.out.iterdir()} == {"summary.txt", "a-gpu.csv", "logs.tar.gz"}
    assert (without_gpu.out / "summary.txt").read_text() in done.stdout
    with tarfile.open(without_gpu.out / "logs.tar.gz") as logs:
        assert "logs/bench-loss.log" in logs.getnames()

    again, repeated = without_gpu.run(*QUICK)
    assert again.returncode == 1
    assert {step for step, state in repeated.items() if state == "finished before"} == {
        step for step, state in states.items() if state == "ok"
    }
    assert "--parts loss" not in without_gpu.calls.read_text() and "doctor" in without_gpu.calls.read_text()

    _, forced = without_gpu.run("--again", "bench/loss")
    assert forced == {"bench/loss": "ok"} and "--parts loss" in without_gpu.calls.read_text()
    assert tree() == before


def test_with_a_gpu_nothing_is_small_or_left_out(with_gpu):
    wanted = ("sanitize", "test", "bench/host", "bench/loss", "bench/peers", "train")
    done, states = with_gpu.run(*wanted, PEERS="/peers", CAMVID="/frames", STUDY="--arms components")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(states.values()) == {"ok"} and len(states) == 13
    called = with_gpu.calls.read_text()
    assert "--tiny" not in called and "-m gpu tests --ignore=tests/test_kernels.py" in called
    assert "--parts peers --peers /peers" in called and "benchmarks.camvid --root /frames" in called
    [study] = [line for line in called.splitlines() if "benchmarks.camvid" in line]
    assert f"--out {with_gpu.keep}/camvid --arms components --minutes 8.33" in study
    assert done.stdout.splitlines()[-1] == "nothing is left"


def test_time_that_runs_out_stops_a_step_and_starts_no_other(without_gpu):
    done, states = without_gpu.run("--minutes", "0.1", "bench/edt", "bench/host")
    assert states["bench/edt"].startswith("stopped after ") and states["bench/host"] == "not reached"
    assert done.returncode == 0 and "left: bench/edt bench/host" in done.stdout.splitlines()[-1]
    done, states = without_gpu.run("--minutes", "0", "bench/loss")
    assert states == {"bench/loss": "not reached"} and "--parts loss" not in without_gpu.calls.read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "say what to run"),
        (["dance"], "expected all, a part or a step"),
        (["--minutes", "many", "all"], "--minutes: expected a number, got 'many'"),
        (["--minutes"], "--minutes: expected a number, got ''"),
    ],
)
def test_what_it_cannot_do_is_said_in_a_sentence(without_gpu, arguments, sentence):
    done, _ = without_gpu.run(*arguments)
    assert done.returncode == 2 and sentence in done.stderr and len(done.stderr.splitlines()) == 1


def test_without_a_folder_for_the_results_nothing_is_run(without_gpu):
    done, _ = without_gpu.run("all", OUT="")
    assert done.returncode == 2 and "set OUT to the folder" in done.stderr


def test_rows_that_would_name_no_commit_are_not_measured(with_gpu, tmp_path):
    elsewhere = tmp_path / "unpacked" / "benchmarks"
    elsewhere.mkdir(parents=True)
    script = shutil.copy(SCRIPT, elsewhere)
    done, states = with_gpu.run(
        "bench/loss", script=script, CONTEXTRAST_COMMIT="", GIT_CEILING_DIRECTORIES=str(tmp_path)
    )
    assert done.returncode == 2 and not states and "set CONTEXTRAST_COMMIT" in done.stderr
    for step, code in (("train/camvid", 2), ("train/demo", 0)):
        done, _ = with_gpu.run(step, script=script, CONTEXTRAST_COMMIT="", GIT_CEILING_DIRECTORIES=str(tmp_path))
        assert done.returncode == code, step
    assert with_gpu.run("bench/loss", script=script)[1] == {"bench/loss": "ok"}


def test_the_script_and_the_runner_understand_each_other(tmp_path):
    """A real step: its rows arrive, what the runner says at its end is understood, and it is finished once."""
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "PEERS": "."}
    for state in ("ok", "finished before"):
        command = [SCRIPT, "--tiny", "--minutes", "9", "bench/peers"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and f"s  {state}\n" in done.stdout, done.stdout + done.stderr
    assert {row.by for row in results.read_all(tmp_path)} == set(peers.RELATIVES)
    assert {"summary.txt", "logs.tar.gz"} <= {path.name for path in tmp_path.iterdir()}


def test_help_names_every_step_and_dry_runs_none(without_gpu):
    text = without_gpu.run("--help")[0].stdout
    assert "first half hour" in text and "CONTEXTRAST_COMMIT" in text and "set -uo" not in text
    done, _ = without_gpu.run("--dry", "all")
    steps = [line.split()[0] for line in done.stdout.splitlines() if "/" in line.split()[0]]
    assert steps[0] == "build/native" and "train/camvid" in steps and len(set(steps)) == len(steps)
    of_the_runner = set(steps) - {"bench/host", "bench/probes"}
    assert {step.removeprefix("bench/") for step in of_the_runner if step.startswith("bench/")} == set(run.PARTS)
    assert not (without_gpu.keep / "summary.txt").exists()


@pytest.mark.slow
def test_small_cases_of_the_real_thing(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    before = tree()
    done = subprocess.run([SCRIPT, "--tiny", "all"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = results.read_all(tmp_path)
    assert any(row.what.startswith("host cost") for row in rows)
    assert tree() == before
