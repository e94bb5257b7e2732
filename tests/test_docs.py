"""The site builds without warnings and without network, and no link of the repository's pages leads nowhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import illada

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "benchmarks").glob("*.md"))
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="the site needs pip install 'illada[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_builds_without_warnings_and_fetches_nothing_when_read(site):
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r'(?:<link[^>]* href|<(?:script|img|iframe)[^>]* src)="((?:https?:)?//[^"]+)', page.read_text()
        )
        assert not fetched, page


def test_links_out_of_docs_lead_to_pages_of_the_site(site):
    assert 'href="SECURITY.html"' in (site / "index.html").read_text()
    assert 'href="benchmarks/RESULTS.html"' in (site / "serving.html").read_text()
    assert 'href="serving.html#security"' in (site / "SECURITY.html").read_text()
    assert 'src="images/denoising.png"' in (site / "index.html").read_text()
    example = (site / "files/examples/train_tiny.py.html").read_text()
    assert "train_tiny" in example
    assert 'href="files/examples/train_tiny.py.html"' in (site / "examples.html").read_text()


def test_every_public_name_is_described(site):
    described = set(re.findall(r'id="illada\.(\w+)"', (site / "api/index.html").read_text()))
    assert described == set(illada.__all__) - {"__version__"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing
