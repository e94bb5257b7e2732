"""The site builds without warnings and without network, and no link of the repository's pages leads nowhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import illada

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "benchmarks").glob("*.md"))
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="the site needs pip install 'illada[docs]'")
    folder = tmp_path_factory.mktemp("site")
    # Without --quiet, which hides warnings from --strict too.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_builds_without_warnings_and_fetches_nothing_when_read(site):
    fetch = re.compile(r'(?:<link[^>]* href|<(?:script|img|iframe)[^>]* src)="((?:https?:)?//[^"]+)')
    fetched = {page.name: fetch.findall(page.read_text()) for page in site.rglob("*.html")}
    assert len(fetched) > 20
    assert not any(fetched.values()), fetched


def test_links_out_of_docs_lead_to_pages_of_the_site(site):
    home, security = (site / "index.html").read_text(), (site / "SECURITY.html").read_text()
    assert '<a href="CONTRIBUTING.html">CONTRIBUTING.md</a>' in home
    assert 'src="images/denoising.png"' in home
    assert 'href="serving.html#security">docs/serving.md</a>' in security
    assert 'href="benchmarks/RESULTS.html">benchmarks/RESULTS.md</a>' in (site / "serving.html").read_text()


def test_source_files_that_a_page_links_to_are_shown(site):
    assert 'href="files/examples/train_tiny.py.html"' in (site / "examples.html").read_text()
    assert "train_tokenizer" in (site / "files/examples/train_tiny.py.html").read_text()
    assert "How an answer is denoised" in (site / "files/examples/denoising.ipynb.html").read_text()


def test_every_public_name_is_described(site):
    described = set(re.findall(r'id="illada\.(\w+)"', (site / "api/index.html").read_text()))
    assert described == set(illada.__all__) - {"__version__"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing
