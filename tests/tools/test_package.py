"""The layout: which module imports which, what importing the package loads, and which files are in the tree."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import contextrast_kernels as ck
from contextrast_kernels.__main__ import main

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "contextrast_kernels"

# A module imports only from layers above its own in this list, or from modules before it in its layer.
FLOORS = [
    ["loops", "measure", "checks", "hashing", "maps", "state", "kernels._tiles"],
    ["native"],
    ["backend", "ranks"],
    ["kernels"],
    ["distance", "embedding"],
    ["anchors", "pixel_anchor", "bane", "info_nce"],
    ["contextrast"],
    ["relatives"],
    ["modules", "metrics", "viz"],
    ["attach", "mmseg"],
    ["__init__"],
    ["demo"],
    ["cases"],
    ["plan"],
    ["doctor", "bench"],
    ["__main__"],
]


def _floor(module: str) -> int:
    names = [module, module.split(".")[0]]
    for name in names:
        for number, floor in enumerate(FLOORS):
            if name in floor:
                return number
    raise AssertionError(f"{module} has no floor: add it to FLOORS")


def _imported(source: pathlib.Path):
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.name}: imports are absolute"
            if node.module == "contextrast_kernels":
                for alias in node.names:
                    yield (
                        alias.name
                        if (PACKAGE / f"{alias.name}.py").exists() or (PACKAGE / alias.name).is_dir()
                        else "__init__"
                    )
            elif (node.module or "").startswith("contextrast_kernels."):
                yield node.module.removeprefix("contextrast_kernels.")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "contextrast_kernels":
                    yield "__init__"


def test_imports_only_go_down():
    for source in sorted(PACKAGE.rglob("*.py")):
        parts = source.relative_to(PACKAGE).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        for imported in _imported(source):
            same_room = imported.split(".")[0] == module.split(".")[0]
            assert same_room or _floor(imported) < _floor(module), f"{module} imports {imported}, which is not below it"


def test_an_import_brings_in_nothing_heavy_beyond_torch_and_does_not_open_the_native_library():
    program = (
        "import pathlib, sys, torch; before = set(sys.modules); import contextrast_kernels; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "heavy = new & {'triton', 'kornia', 'skimage', 'matplotlib', 'tqdm', 'scipy', 'cv2', 'cupy'}; "
        "assert not heavy, heavy; assert 'contextrast_kernels.demo' not in sys.modules; "
        "maps = pathlib.Path('/proc/self/maps'); "
        "assert not maps.exists() or 'contextrast_kernels' not in maps.read_text()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_setup_never_imports_torch():
    tree = ast.parse((ROOT / "setup.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name.split(".")[0] in ("torch", "contextrast_kernels") for name in names if name)


@pytest.mark.parametrize("name", ck.__all__)
def test_every_public_name_is_documented(name):
    documented = getattr(ck, name)
    assert documented.__doc__ and len(documented.__doc__.split()) >= 5
    if callable(documented) and name not in ("available", "backend"):
        assert all(f"\n    {section}:\n" in documented.__doc__ for section in ("Args", "Raises"))


def test_doctor_checks_this_machine(capsys):
    status, printed = main(["doctor"]), capsys.readouterr().out
    assert status == 0, printed
    for words in ("torch", "reference", "triton", "native", "all checks passed"):
        assert words in printed


@pytest.mark.parametrize("arguments", [[], ["dance"]])
def test_an_unknown_command_is_refused_with_the_known_ones(arguments, capsys):
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert "doctor" in errors and "demo" in errors


@pytest.mark.parametrize(
    "case", ["cityscapes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ade20k", "camvid"))]
)
def test_the_plan_lists_every_launch(case, capsys):
    pytest.importorskip("triton")
    assert main(["bench", "--plan", "--case", case]) == 0
    lines = capsys.readouterr().out.splitlines()
    [launches] = [int(line.split()[0]) for line in lines if " launches, " in line]
    listed = [line for line in lines if line.startswith(("_", "sums", "seed", "negatives", "grad"))]
    assert len(listed) == launches <= 24


def test_the_address_of_the_repository_is_the_same_everywhere():
    urls = dict(re.findall(r'^(Repository|Issues|Changelog) = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M))
    home = urls["Repository"]
    assert urls["Issues"] == f"{home}/issues" and urls["Changelog"] == f"{home}/blob/main/CHANGELOG.md"
    assert f"\nrepo_url: {home}\n" in (ROOT / "mkdocs.yml").read_text()
