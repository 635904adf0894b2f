"""The documentation builds without a warning, links only to what exists, and has a page for every public name."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import contextrast_kernels as ck

pytest.importorskip("mkdocs", reason="mkdocs is not installed; pip install -e '.[docs]'")

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def public_names():
    for name in ck.__all__:
        value = getattr(ck, name)
        yield from (f"{name}.{member}" for member in value.__all__) if name in ("metrics", "viz") else (name,)


def test_every_public_name_has_a_page(site):
    for name in public_names():
        page = site / "api" / name / "index.html"
        assert page.exists(), name
        assert f'id="contextrast_kernels.{name}"' in page.read_text() or "doc-contents" in page.read_text(), name


def test_every_link_inside_the_site_leads_somewhere(site):
    for page in site.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#]+)', page.read_text()):
            if re.match(r"[a-z]+:|//", link) or page.name == "404.html":
                continue
            target = (page.parent / link.split("?")[0]).resolve()
            assert target.exists(), f"{page.relative_to(site)} links to {link}"


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((ROOT / "examples" / "tour.ipynb").read_text())["cells"]
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    stored = "".join("".join(o.get("text", "")) for cell in cells for o in cell.get("outputs", []))
    for line in done.stdout.splitlines()[:5]:  # the table of attach, which has no measured number
        assert f"{line}\n" in stored
