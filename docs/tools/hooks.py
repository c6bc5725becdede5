"""Hooks of mkdocs: pages that are generated, and links to files of the repository.

README.md is the first page, CHANGELOG.md and CONTRIBUTING.md are pages, and so is each other file of the repository
that a page links to: the site is whole without a place on the network.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

import reference

REPOSITORY = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Documents of the repository that are pages of the site."""
_LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"^(```.*?^```|~~~.*?^~~~)", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"^<!-- (?:not run|shown)[^>]*-->\n", re.MULTILINE)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".md": "markdown", ".sh": "bash"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the navigation: pages that it does not name, and the settings."""
    named = {leaf for leaf in reference.unlisted(config.nav) if isinstance(leaf, str)}
    written = {path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).rglob("*.md")}
    for part in config.nav or ():
        for title, items in part.items():
            if title == "Guides":
                items += sorted(written - named)
            elif title == "Settings":
                items += list(reference.pages())
            elif title == "Project":
                items.append(PAGES["CONTRIBUTING.md"])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    texts = {page.src_uri: page.content_string for page in files.documentation_pages()}
    for source, target in PAGES.items():
        texts[target] = (REPOSITORY / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=texts[target]))
    for target, content in reference.pages().items():
        files.append(File.generated(config, target, content=content))
    linked = {_source(uri, link) for uri, text in texts.items() for link in _links(text)} - {None, *PAGES}
    for path in sorted(path for path in linked if path is not None and not path.startswith("docs/")):
        source = REPOSITORY / path
        listed = sorted(source.rglob("*.py")) if source.is_dir() else [source]
        content = f"# {path}\n\n" + "\n".join(_shown(file, title=source.is_dir()) for file in listed)
        made = File.generated(config, f"files/{path}.md", content=content)
        made.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(made)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository lead to their pages; marks for the tests of blocks are left out."""
    uri = page.file.src_uri

    def page_of(found: re.Match[str]) -> str:
        path = _source(uri, found[2])
        if path is None:
            return found[0]
        target = PAGES.get(path) or f"files/{path}.md"
        if path.startswith("docs/"):
            target = path.removeprefix("docs/")
        return f"{found[1]}{relpath(target, Path(uri).parent.as_posix())}{found[3]}"

    parts = _FENCE.split(_MARK.sub("", markdown))
    return "".join(part if part.startswith(("```", "~~~")) else _LINK.sub(page_of, part) for part in parts)


def _links(text: str) -> list[str]:
    return [link for part in _FENCE.split(text) if not part.startswith("```") for _, link, _ in _LINK.findall(part)]


def _source(uri: str, link: str) -> str | None:
    """The path in the repository of what a page links to; None for a page of docs/ that links to another one."""
    outside = next((source for source, target in PAGES.items() if target == uri), None)
    path = normpath(f"{'.' if outside else 'docs/' + Path(uri).parent.as_posix()}/{link}")
    if outside is None and path.startswith("docs/"):
        return None
    return path if (REPOSITORY / path).exists() else None


def _shown(path: Path, *, title: bool) -> str:
    """A file as a block of code."""
    name = path.relative_to(REPOSITORY).as_posix()
    text = path.read_text(encoding="utf-8").rstrip()
    head = f"## {name}\n\n" if title else ""
    return f"{head}````{_LANGUAGES.get(path.suffix, 'text')}\n{text}\n````\n"
