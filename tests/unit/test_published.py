"""What is published: the registry's archive, the repository's checks, links, citation."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

from stylemaster_core.pipelines.tiny import tiny_files

PACK = Path(__file__).parents[2]
LARGEST_MB = 37
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{p.name}" for p in PACK.glob("docs/*.md")),
]


def text(name: str) -> str:
    return (PACK / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def archived() -> list[str]:
    """Files of the repository that `comfy node pack` takes; the rules are those of .gitignore."""
    if shutil.which("git") is None or not (PACK / ".git").exists():
        pytest.skip("this is no clone")

    def files(*options: str) -> set[str]:
        command = ["git", "ls-files", "-z", *options]
        done = subprocess.run(command, cwd=PACK, capture_output=True, check=True, text=True)
        return set(done.stdout.split("\0")) - {""}

    return sorted(files() - files("--cached", "--ignored", "--exclude-from=.comfyignore"))


def test_the_archive_is_small(archived):
    packed = sum(len(zlib.compress((PACK / name).read_bytes())) for name in archived)
    assert packed < LARGEST_MB * 1e6
    assert not [name for name in archived if name.startswith(("tests/", "bench/", "recipes/"))]


def test_the_archive_holds_all_that_the_pack_needs(archived):
    kept = set(archived)
    code = {path.relative_to(PACK).as_posix() for path in (PACK / "nodes").rglob("*.py")}
    code |= {p.relative_to(PACK).as_posix() for p in (PACK / "stylemaster_core").rglob("*.py")}
    assert code <= kept
    files = (tiny_files(), tiny_files(stylecrafter=True))
    tiny = [Path(str(path)) for models in files for path in vars(models).values() if path]
    needed = [path for place in tiny for path in (place, *place.rglob("*")) if path.is_file()]
    assert {path.relative_to(PACK).as_posix() for path in needed} <= kept
    assert {"__init__.py", "pyproject.toml", "LICENSE", "weights_manifest.json"} <= kept
    for folder, kind in (
        ("workflows", "*.json"),
        ("web", "*.js"),
        ("web/docs", "**/*.md"),
        ("locales", "**/*.json"),
    ):
        files = {p.relative_to(PACK).as_posix() for p in (PACK / folder).glob(kind)}
        assert files and files <= kept


def test_pictures_of_help_pages_are_in_the_archive(archived):
    for page in (PACK / "web" / "docs").rglob("*.md"):
        for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            place = (PACK / "web" / "docs" / link).resolve()
            assert place.relative_to(PACK.resolve()).as_posix() in archived


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_docs_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text(page))
    missing = [
        link
        for link in links
        if not link.startswith("http") and not (PACK / page).parent.joinpath(link).exists()
    ]
    assert not missing


def test_the_readme_is_short():
    assert len(text("README.md").splitlines()) <= 125


def test_publishing_waits_for_every_check():
    publish, checks = (text(f".github/workflows/{name}.yml") for name in ("publish", "checks"))
    assert "Comfy-Org/publish-node-action" in publish and "needs: checks" in publish
    assert "workflow_call" in checks
    for step in ("make lint", "make types", "make unit", "make comfy-tests"):
        assert step in checks


def test_versions_and_papers_agree():
    version = re.search(r'^version = "(.+)"$', text("pyproject.toml"), re.MULTILINE)
    assert version is not None
    assert f"version: {version.group(1)}\n" in text("CITATION.cff")
    assert f"## {version.group(1)}\n" in text("CHANGELOG.md")
    for paper in ("2412.07744", "2312.00330"):
        assert paper in text("CITATION.cff")
        assert paper in text("README.md")
