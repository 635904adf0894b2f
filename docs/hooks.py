"""Hooks for mkdocs: README.md becomes the first page, and every public name gets a page made from its docstring."""

import pathlib
import re

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

import contextrast_kernels as ck

ROOT = pathlib.Path(__file__).parent.parent
MODULES = ("metrics", "viz")


def api_names() -> list[str]:
    """Every public name: those of the package, then those of its public modules."""
    members = [f"{module}.{name}" for module in MODULES for name in getattr(ck, module).__all__]
    return [*(name for name in ck.__all__ if name not in MODULES), *members]


def on_config(config):
    groups = {None: [name for name in api_names() if "." not in name]}
    groups |= {module: [name for name in api_names() if name.startswith(f"{module}.")] for module in MODULES}
    pages = {group: [{name: f"api/{name}.md"} for name in names] for group, names in groups.items()}
    config.nav.append({"API": [*pages.pop(None), *({group: names} for group, names in pages.items())]})
    return config


@event_priority(100)  # before the plugin that turns notebooks into pages
def on_files(files, config):
    tree = f"{config.repo_url}/blob/main"
    readme = (ROOT / "README.md").read_text()
    readme = re.sub(r"\]\(docs/", "](", readme)
    outside = (
        r"\]\((?!https?:|#)((?:[\w-]+/)*(?:LICENSE|CONTRIBUTING\.md|CHANGELOG\.md|[\w-]+\.(?:py|csv))|examples/?)\)"
    )
    readme = re.sub(outside, rf"]({tree}/\1)", readme)
    files.append(File.generated(config, "index.md", content=readme))
    for name in api_names():
        text = f"::: contextrast_kernels.{name}\n"
        files.append(File.generated(config, f"api/{name}.md", content=text))
    files.append(File("tour.ipynb", str(ROOT / "examples"), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to files that are in the repository but not in the site lead to the repository."""
    return re.sub(r"\]\(\.\./(?=[\w.])", f"]({config.repo_url}/blob/main/", markdown)
