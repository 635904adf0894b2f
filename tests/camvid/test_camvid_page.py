"""The page matches the rows, also without any rows."""

import itertools
import json
import random
import shutil
from dataclasses import replace

import pytest

from benchmarks import report, results
from benchmarks.camvid import arms, page
from benchmarks.camvid.rows import FILE, Result

LOG = {
    "at_edge": [[0.2, 0.5, 0.7, 0.9]] * 4 + [[0.25, 0.55, 0.75, 0.95]],
    "errors": [[0.1, 0.1, 0.1, None]] * 5,
    "negatives": [[600.0, 150.0, 40.0, 10.0]] * 5,
    "classes": [[11.0, 11.0, 10.0, 9.0]] * 5,
    "loss": [[1.5, 1.25, 1.0, 0.5]] * 5,
    "ratio": [[0.1, 0.1, 0.1, 0.2, 0.12]] * 5,
    "cosine": [[0.0, 0.1, -0.1, 0.2, 0.05]] * 5,
}


def made_up(protocol, arm, seed, miou=0.5, **changes):
    """A finished training; the other scores follow mIoU."""
    scores = {"rare": miou - 0.2, "boundary_3": miou - 0.25, "boundary_5": miou - 0.2}
    log = json.dumps(LOG if arm != "baseline" else {name: LOG[name] for name in ("at_edge", "errors")})
    shared = {"alignment": 0.8, "uniformity": 0.9, "cpu_seconds": 500.0, "log": log, "device": "a CPU"}
    where = {"torch": "2.14.1", "libraries": "timm 1.0", "commit": "0123456"}
    return replace(Result(protocol, arm, seed, 0.1, "ok", miou=miou, **(scores | shared | where)), **changes)


def study(effect, seeds, protocols=("pretrained", "few-labels"), scatter=0.01):
    """Rows in which every arm has this effect on mIoU, up to the seeds' scatter."""
    rows, draw = [], random.Random(0)
    for protocol, seed in itertools.product(protocols, range(seeds)):
        for arm in page.STUDIES[protocol]:
            rows.append(made_up(protocol, arm, seed, 0.5 + (arm != "baseline") * effect + draw.gauss(0, scatter)))
    return rows


def beginning(rows):
    """The heading, and the paragraph below it."""
    heading, empty, paragraph = page.page(rows, page.plots(rows)).splitlines()[:3]
    assert not empty
    return heading, paragraph


def first_line(rows):
    return beginning(rows)[0]


def test_first_line_without_enough_seeds_says_so():
    none = "Not known yet: {} of 8 planned seeds are trained, {} with a quarter of the labels."
    assert first_line([]) == f"# Does the loss help on CamVid? {none.format(0, 0)}"
    assert none.format(2, 2) in first_line(study(0.3, 2))
    heading, paragraph = beginning(study(0.3, 3, protocols=["pretrained"]))
    assert heading.endswith("With a quarter of the labels: not known yet.")
    assert paragraph.endswith(" With a quarter of the labels 0 of 8 planned seeds are trained.")
    unpaired = [made_up("pretrained", "baseline", seed) for seed in range(4)]
    assert none.format(0, 0) in first_line(unpaired + [made_up("pretrained", "bane", seed) for seed in range(4, 8)])


def test_first_line_says_what_the_data_show():
    for effect, shown, sign in ((0.025, "yes", "+2"), (-0.025, "it does harm", "-2")):
        heading, paragraph = beginning(study(effect, 8))
        assert f"With all labels: {shown}." in heading and "power" not in paragraph
        assert paragraph.startswith(f"With all labels the mean difference from cross-entropy alone is {sign}")
    rows = study(0.0, 8)
    heading, paragraph = beginning(rows)
    assert heading.endswith("? With all labels: no effect was seen. With a quarter of the labels: no effect was seen.")
    bane = page.difference(rows, "pretrained", "bane", "miou")
    assert paragraph.startswith(
        f"With all labels the mean difference from cross-entropy alone is {bane.mean:+.2f} points of mIoU (95 % "
        f"interval [{bane.student[0]:+.2f}, {bane.student[1]:+.2f}]) over 8 of 8 planned seeds; an uncorrected test "
        f"detects a true difference of {bane.detectable:.1f} points with 80 % power. With a quarter of the labels"
    )
    heading, paragraph = beginning(study(0.025, 5, scatter=0.003))
    assert "With all labels: yes." in heading and "over 5 of 8 planned seeds." in paragraph


def test_a_number_that_is_rounded_to_zero_has_no_sign():
    assert [page.number(x, "+.2f") for x in (-0.004, 0.0, 0.004, -0.006, 10.0)] == [
        *("0.00", "0.00", "0.00", "-0.01", "+10.00")
    ]
    assert page.interval((-0.004, 0.006)) == "[0.00, +0.01]" and page.number(float("nan"), "+.2f") == "–"


def test_first_line_is_corrected_over_the_arms():
    """A difference whose own p is below 0.05 and above 0.05 / 9 is no evidence among nine arms."""
    rows = [made_up("pretrained", "baseline", s) for s in range(4)]
    for arm in page.STUDIES["pretrained"][1:]:
        steps = (0.01, 0.02, 0.02, 0.035) if arm == "bane" else (0.02, -0.02, 0.01, -0.01)
        rows += [made_up("pretrained", arm, s, 0.5 + step) for s, step in enumerate(steps)]
    assert 0.05 / 9 < page.difference(rows, "pretrained", "bane", "miou").p < 0.05
    assert page.corrected(rows, "pretrained")["bane"] > 0.05
    assert "With all labels: no effect was seen" in first_line(rows)


def test_differences_are_taken_seed_by_seed_in_percentage_points():
    rows = [made_up("pretrained", "baseline", s, miou) for s, miou in ((0, 0.4), (1, 0.5), (2, 0.6))]
    rows += [made_up("pretrained", "bane", s, miou) for s, miou in ((2, 0.63), (0, 0.41), (7, 0.9))]
    rows += [made_up("few-labels", "bane", 1, 0.9), replace(made_up("pretrained", "bane", 1), status="diverged: so")]
    assert page.difference(rows, "pretrained", "bane", "miou").differences == pytest.approx((1.0, 3.0))
    assert page.difference(rows, "pretrained", "bane", "uniformity").differences == (0.0, 0.0)


def test_page_holds_the_numbers_of_its_rows():
    rows = study(0.02, 3)
    rows += [
        made_up("alpha", arm, s, 0.5 + 0.05 * (arm == "alpha-0.3")) for arm in arms.SWEEP for s in arms.SWEEP_SEEDS
    ]
    rows += [
        replace(made_up("timing", arm, 0), miou=None, step_ms=ms) for arm, ms in (("baseline", 800.0), ("bane", 1000.0))
    ]
    text = page.page(rows, page.plots(rows))
    assert "The sweep is complete: α = 0.3." in text and "| 0.3 | 2 | 55.00 ± 0.00 |" in text
    assert "| `bane` | 1000 | 1.25 | a CPU |" in text
    assert "| stride 4 | 10.0 | 25 | 600 | 11.0 | 1.50 | 0.100 | 0.000 |" in text
    assert "25 % of the error pixels at stride 4 and 95 % at stride 32" in text and "12.0 % of the norm" in text
    assert f"| status | {3 * 10 + 3 * 3 + 6} of {len(list(arms.plan()))} trainings finished | not run |" in text
    assert "git worktree add ../camvid-study 0123456" in text and "500 CPU seconds" in text
    assert "{" not in text and "nan" not in text
    bane = page.difference(rows, "pretrained", "bane", "miou")
    assert f"| {bane.mean:+.2f} | [{bane.student[0]:+.2f}, {bane.student[1]:+.2f}] |" in text


def test_each_question_has_one_table_and_one_picture():
    rows = study(0.02, 3) + [made_up("alpha", arm, s) for arm in arms.SWEEP for s in arms.SWEEP_SEEDS]
    rows += [replace(made_up("timing", arm, 0), miou=None, step_ms=800.0) for arm in ("bane", "baseline")]
    text = page.page(rows, page.plots(rows))
    questions = [section for section in text.split("\n## ") if "?" in section.splitlines()[0]][1:]
    assert len(questions) == 6
    for section in questions:
        assert section.count("\n| --- |") == 1, section
        assert section.count("\n![") == 1, section


def test_diverged_trainings_are_counted():
    rows = [*study(0.0, 2), replace(made_up("pretrained", "bane", 2), status="diverged: so")]
    assert "| `bane` | " + arms.ARMS["bane"].text + " | 2, 1 diverged |" in page.page(rows, ())


def test_log_is_averaged_without_missing_layers():
    other = {**LOG, "errors": [[0.3, 0.1, 0.1, 0.4]] * 5}
    rows = [made_up("pretrained", "bane", 0), made_up("pretrained", "bane", 1, log=json.dumps(other))]
    assert page.logged(rows)["errors"][0] == pytest.approx([0.2, 0.1, 0.1, 0.4])


def test_evidence_compares_with_our_default():
    rows = study(0.0, 3)
    text = page.evidence(rows)
    assert len(text.splitlines()) == 2 + len(page.CHOICES)
    ccl = page.difference(rows, "few-labels", "ccl", "miou", against="bane")
    assert f"{ccl.mean:+.2f} [{ccl.student[0]:+.2f}, {ccl.student[1]:+.2f}], n = 3 |" in text
    assert "not planned" in text and page.evidence([]).count("not measured yet") == 5


@pytest.fixture
def docs(tmp_path):
    shutil.copytree(report.ROOT / "docs", tmp_path / "docs")
    shutil.copy(report.ROOT / "README.md", tmp_path)
    shutil.copytree(results.FOLDER, tmp_path / "results")
    return tmp_path


@pytest.mark.parametrize("seeds", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_report_writes_the_page_and_finds_it_stale(docs, capsys, seeds):
    pytest.importorskip("matplotlib")
    call = ["--root", str(docs), "--results", str(docs / "results")]
    results.write(docs / "results" / FILE, study(0.01, seeds), Result)
    assert report.main(call) == 0 and report.main([*call, "--check"]) == 0
    assert (docs / "docs/camvid/all-labels.png").exists() == (docs / "docs/camvid/layers.png").exists() == (seeds > 0)
    results.write(docs / "results" / FILE, study(0.02, 4), Result)
    capsys.readouterr()
    assert report.main([*call, "--check"]) == 1 and "camvid.md does not match" in capsys.readouterr().out


def test_committed_trainings_are_of_one_commit_and_the_schema():
    rows = results.read(results.FOLDER / FILE, Result)
    assert len({row.commit for row in rows if row.protocol != "timing"}) <= 1
    assert len({row.measured for row in rows}) == len(rows)
