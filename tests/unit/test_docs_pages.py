"""The pages: links lead somewhere, the index lists them all, and each begins by saying what it is for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS, *sorted((ROOT / "docs" / "benchmarks").glob("*.md"))]


def prose_of(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """What `#...` may name on a page: its headings, spelt as the hubs that show Markdown spell them."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS if page.name != "index.md" and f"]({page.name})" not in index] == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_begins_with_a_title_and_a_sentence(page: Path) -> None:
    title, blank, first = page.read_text(encoding="utf-8").splitlines()[:3]
    assert re.match(r"# \S", title)
    assert blank == ""
    assert re.match(r"[`A-Z]", first), "a command or a table tells nobody what the page is for"


def test_every_field_of_a_manifest_is_explained(refitted: Path) -> None:
    page = (ROOT / "docs" / "manifest.md").read_text(encoding="utf-8")
    manifest = json.loads((refitted / "factorctl.json").read_text(encoding="utf-8"))
    details = manifest["details"]
    parts = (manifest, manifest["source"], manifest["factored"], details, details["calibration"], details["layers"][0])
    assert sorted({name for part in parts for name in part if f"`{name}`" not in page}) == []
