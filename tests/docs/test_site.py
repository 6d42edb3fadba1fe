"""The site is built strictly, its links lead somewhere, and its programs are on it."""

from __future__ import annotations

import functools
import html
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.package.tree import extras
from tests.python import PYTHON

from .programs import ROOT, START

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [PYTHON, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return folder


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Return the address where the site is served."""
    handler = functools.partial(_Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.slow
def test_no_link_is_broken(address: str) -> None:
    """The rendered pages and pictures are checked; the strict build checks anchors, and other hosts are not asked."""
    command = [PYTHON, "-m", "linkcheck", "--no-status", "--timeout", "30"]
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    checked = re.search(r"(\d+) links in \d+ URLs checked", done.stdout)
    assert checked, done.stdout
    assert int(checked[1]) > 60


@pytest.mark.slow
def test_the_programs_are_shown_whole(site: Path) -> None:
    page = re.sub(r"<[^>]+>", "", (site / "start" / "index.html").read_text())
    shown = html.unescape(page)
    for program in START.glob("*.py"):
        assert program.read_text().strip() in shown, program.name


@pytest.mark.slow
def test_every_formula_is_rendered(site: Path) -> None:
    """MathML replaces LaTeX, and contains no command unknown to the renderer, which would leave it as it is."""
    pages = {str(path.relative_to(site)): path.read_text() for path in site.rglob("*.html")}
    assert [name for name, page in pages.items() if "arithmatex" in page] == []
    formulas = re.findall(r"<math .*?</math>", pages["idea/index.html"], re.S)
    assert len(formulas) > 40
    assert [formula for formula in formulas if "\\" in formula or "$" in formula] == []


@pytest.mark.slow
def test_a_number_and_its_interval_stay_on_one_line(site: Path) -> None:
    page = (site / "evidence" / "index.html").read_text()
    assert "0.056&nbsp;±&nbsp;0.046" in page and " ± " not in page


def local_links(page: Path) -> Iterator[str]:
    for link in _LINK.findall(page.read_text()):
        if not re.match(r"[a-z]+:", link):
            yield link


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_pages_outside_the_site_link_to_files_that_are_there(page: str) -> None:
    missing = [link for link in local_links(ROOT / page) if not (ROOT / link.split("#")[0]).exists()]
    assert missing == []


def test_every_picture_of_the_pages_is_in_the_tree_and_every_picture_in_the_tree_is_on_a_page() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    links = {link.partition("#")[0] for page in pages for link in local_links(page)}
    used = {Path(link).name for link in links if link.endswith(".png")}
    assert used == {path.name for path in (ROOT / "docs").rglob("*.png")}


def test_readme_and_the_page_start_name_every_extra_of_a_user() -> None:
    wanted = extras() - {"docs", "dev"}
    listed = re.search(r"^Extras: (.+?)\.$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert listed is not None
    assert set(re.findall("`([a-z-]+)`", listed[1])) == wanted
    start = (ROOT / "docs" / "start.md").read_text()
    named = re.findall(r'"\.\[([a-z-]+)\]"', start) + re.findall(r"^\| `([a-z-]+)` \|", start, re.M)
    assert set(named) == wanted


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 700
