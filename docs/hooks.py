"""Hooks of MkDocs: files of the repository outside docs/ become pages where a page links to them.

A link names a file by its path from the page that it is on, as code hosts read it: `../benchmarks/RESULTS.md` in
docs/serving.md, `docs/data.md` in README.md. The site has README.md as its first page, other Markdown files where they
are, and any other file or folder, as a listing, below files/. `on_page_markdown` turns the links accordingly.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
START = ["README.md", "CHANGELOG.md", "SECURITY.md"]
"""Pages that need no link to be there."""
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)\s#]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every file outside docs/ that can be reached by links."""
    waiting = [ROOT / name for name in START]
    waiting += [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.is_relative_to(DOCS):
            content = None if path.suffix == ".md" else listing(path)
            source = None if content else str(path)
            files.append(File.generated(config, address(path), content=content, abs_src_path=source))
        if path.suffix == ".md":
            waiting += filter(None, (target(path, match) for match in LINK.finditer(path.read_text())))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Turn links to files of the repository into links between pages."""
    if page.file.abs_src_path is None:  # a listing: what looks like a link there is code
        return markdown
    path = Path(page.file.abs_src_path)

    def turn(match: re.Match[str]) -> str:
        linked = target(path, match)
        if linked is None:
            return match[0]
        place = posixpath.relpath(address(linked), posixpath.dirname(address(path)) or ".")
        return place + ((match[2] or "") if linked.suffix == ".md" else "")

    return LINK.sub(turn, markdown)


def target(page: Path, match: re.Match[str]) -> Path | None:
    """Return what a link names in the repository; None for what is not there, of which MkDocs complains."""
    path = (page.parent / match[1]).resolve()
    return path if path.is_relative_to(ROOT) and path.exists() else None


def address(path: Path) -> str:
    """Return where a file of the repository is in the site."""
    if path == ROOT / "README.md":
        return "index.md"
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(ROOT).as_posix()
    return name if path.suffix == ".md" else f"files/{name}.md"


def listing(path: Path) -> str:
    """Return a page that shows a source file, a notebook, or what is in a folder."""
    title = f"# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_dir():
        return title + "".join(f"- `{entry.name}{'/' * entry.is_dir()}`\n" for entry in sorted(path.iterdir()))
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text())["cells"]
        texts = [(cell["cell_type"] == "code", "".join(cell["source"])) for cell in cells]
        return title + "\n\n".join(f"~~~~python\n{text}\n~~~~" if code else text for code, text in texts)
    return f"{title}~~~~{path.suffix.removeprefix('.')}\n{path.read_text()}\n~~~~\n"
