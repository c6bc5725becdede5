"""The site that `make docs` builds: strict, complete, needs no network, is readable wide and narrow, light and dark."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from danling_conf.config.typed import setting_paths
from danling_conf.groups.presets import GROUPS
from danling_conf.schema import RunnerConfig
from tests.cli.browser import dom_of
from tests.support.documents import DOCUMENTS, REPOSITORY

pytestmark = pytest.mark.slow

TOOLS = REPOSITORY / "docs" / "tools"
PICTURES = sorted(path.stem for path in (REPOSITORY / "docs" / "pictures").glob("*.svg"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False, env=quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages(site: Path) -> dict[str, str]:
    """Every page by its path in the site."""
    return {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def test_every_document_is_a_page_that_the_navigation_names(site: Path) -> None:
    listed = re.findall(r'<a href="([^"]+)" class="md-nav__link', (site / "index.html").read_text())
    expected = {f"{Path(name).stem.lower()}.html" for name in DOCUMENTS} - {"readme.html"}
    assert expected | {"changelog.html", "settings/index.html"} <= set(listed)


def test_every_setting_and_preset_has_an_entry(site: Path) -> None:
    anchors = {anchor for text in pages(site).values() for anchor in re.findall(r'<h[23] id="([^"]+)"', text)}
    settings = {path for path in setting_paths(RunnerConfig) if not path.startswith("_")}
    presets = {f"{group}={name}" for group, choices in GROUPS.items() for name in choices}
    assert settings | presets <= anchors
    assert {"danling_local.parallel_jobs", "danling_slurm.partition"} <= anchors


def test_the_search_knows_settings(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    places = {entry["location"] for entry in index["docs"]}
    assert "settings/fsdp.html#fsdp.reshard_after_forward" in places


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Links lead elsewhere; scripts, styles, fonts and pictures do not."""
    for name, text in pages(site).items():
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]+src="?([^"\s>]+)', text)
        loaded += re.findall(r'<link[^>]+rel="?(?:stylesheet|icon|preload|preconnect)"?[^>]*href="?([^"\s>]+)', text)
        assert [source for source in loaded if "//" in source] == [], name
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style
    for picture in site.rglob("*.svg"):
        assert not re.search(r"url\([\"']?http|href=[\"']http", picture.read_text()), picture


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_an_image_with_a_size(name: str) -> None:
    drawing = ElementTree.parse(REPOSITORY / "docs" / "pictures" / f"{name}.svg").getroot()
    assert float(drawing.attrib["width"]) > 300
    used = {document for document in DOCUMENTS if f"pictures/{name}.svg" in (REPOSITORY / document).read_text()}
    assert used


def tool(name: str) -> ModuleType:
    """A script of docs/tools as a module."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["mesh", "pipeline", "road", "watch"])
def test_pictures_are_what_the_script_draws(name: str) -> None:
    """All but the report's, which trains: `python docs/tools/pictures.py` writes them."""
    pictures = tool("pictures")
    assert (REPOSITORY / "docs" / "pictures" / f"{name}.svg").read_text() == pictures.PICTURES[name]()


PROBE = """<!doctype html><meta charset="utf-8"><body><pre id="found"></pre><script>
const found = [];
async function look(name, width) {
  const frame = document.createElement('iframe');
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.src = name;
  const loaded = new Promise(done => frame.onload = done);
  document.body.append(frame);
  await loaded;
  const page = frame.contentDocument, style = frame.contentWindow.getComputedStyle(page.body);
  found.push({name, width, wide: page.documentElement.scrollWidth,
    titles: [...page.querySelectorAll('h1')].map(h => h.textContent.trim()),
    levels: [...page.querySelectorAll('article :is(h1,h2,h3,h4)')].map(h => +h.tagName[1]),
    broken: [...page.images].filter(i => i.src && !i.naturalWidth).map(i => i.src),
    back: style.backgroundColor, ink: style.color,
    elsewhere: frame.contentWindow.performance.getEntriesByType('resource')
      .map(r => r.name).filter(n => !n.startsWith('file:'))});
  frame.remove();
}
(async () => {
  for (const name of PAGES) for (const width of WIDTHS) await look(name, width);
  document.getElementById('found').textContent = JSON.stringify(found);
})();
</script>"""
"""A page that looks at all others, each in a frame as wide as a screen."""
WIDE, NARROW = 1280, 390


@pytest.mark.parametrize(("widths", "dark"), [([WIDE, NARROW], False), ([NARROW], True)], ids=["light", "dark"])
def test_in_a_browser(site: Path, tmp_path: Path, widths: list[int], dark: bool) -> None:
    # The page of errors is for servers: its links begin at the root.
    names = sorted(name for name in pages(site) if not name.startswith(("files/", "probe", "404")))
    probe = site / f"probe-{dark}.html"
    probe.write_text(PROBE.replace("PAGES", json.dumps(names)).replace("WIDTHS", json.dumps(widths)), encoding="utf-8")
    allowed = ("--virtual-time-budget=100000", "--allow-file-access-from-files")
    document = dom_of(probe, tmp_path, *allowed, dark=dark)
    written = re.search(r'<pre id="found">(.+?)</pre>', document, re.DOTALL)
    assert written, "the page that looks at all others came to no end"
    found = json.loads(unescape(written[1]))
    assert len(found) == len(names) * len(widths) > 40
    for page in found:
        where = f"{page['name']} at {page['width']}"
        assert page["wide"] <= page["width"], f"{where} is {page['wide']} wide"
        assert len(page["titles"]) == 1, f"{where} has the titles {page['titles']}"
        steps = zip(page["levels"], page["levels"][1:], strict=False)
        assert all(after - before <= 1 for before, after in steps), f"{where} leaves out a level: {page['levels']}"
        assert page["broken"] == page["elsewhere"] == [], where
        assert (lightness(page["ink"]) > lightness(page["back"])) == dark, where


def lightness(colour: str) -> float:
    """Sum of red, green and blue of `rgb(...)`."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3]))


def test_the_search_works_on_pages_that_are_read_from_the_disk(site: Path, tmp_path: Path) -> None:
    document = dom_of(
        f"{(site / 'index.html').as_uri()}?q=reshard_after_forward", tmp_path, "--virtual-time-budget=20000"
    )
    assert "settings/fsdp.html" in "".join(
        re.findall(r'class="md-search-result__link"[^>]*href="([^"]+)"', document)
        or re.findall(r'href="([^"]+)"[^>]*class="md-search-result__link"', document)
    )
