"""The page in a real browser: its scripts run, tables are sorted, the theme turns, nothing is complained of."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cat_plugin.report.content import Content
from cat_plugin.report.page import render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--window-size=1400,2400",
)  # fmt: skip

# A reader who presses things: a heading twice, another once, the button for the theme.
READER = """
const say = (key, value) => document.body.setAttribute("data-" + key, value);
const column = (table, at) => [...document.querySelectorAll(`#${table} tbody tr`)].map(r => r.cells[at].textContent).join("|");
const press = (table, at) => document.querySelectorAll(`#${table} th button`)[at].click();
press("layers-table", 4); say("once", column("layers-table", 1));
press("layers-table", 4); say("twice", column("layers-table", 1));
press("accuracy-table", 3); say("unknown-last", column("accuracy-table", 3));
document.getElementById("theme").click();
say("theme", document.documentElement.dataset.theme + " " + getComputedStyle(document.body).backgroundColor);
say("ready", document.querySelectorAll('table[data-sortable="ready"]').length);
say("wide", document.documentElement.scrollWidth > window.innerWidth);
"""


def open_page(path: Path, profile: Path, *options: str) -> tuple[str, str]:
    """The page's elements after its scripts have run, and what the browser logged."""
    assert CHROMIUM is not None
    words = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", *options, "--dump-dom", path.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(console)


def with_reader(page: str, reader: str = READER) -> str:
    """The page with a script that it admits beside its own."""
    digest = base64.b64encode(hashlib.sha256(reader.encode()).digest()).decode()
    admitted = page.replace("script-src ", f"script-src &#39;sha256-{digest}&#39; ", 1)
    return admitted.replace("</body>", f"<script>{reader}</script></body>")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_reader_sorts_and_turns_the_theme(content: Content, tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "report.html"
    path.write_text(with_reader(render(content)), encoding="utf-8")
    options = ["--force-dark-mode"] if scheme == "dark" else []
    page, console = open_page(path, tmp_path / "profile", *options)
    assert console == ""
    said = dict(re.findall(r'data-(once|twice|unknown-last|theme|ready|wide)="([^"]*)"', page))
    assert said["once"] == "stem|body"  # more bits first
    assert said["twice"] == "body|stem"
    assert said["unknown-last"] == "86.42 %|\N{EN DASH}|\N{EN DASH}"
    other = {"light": "dark rgb(20, 22, 26)", "dark": "light rgb(250, 250, 248)"}
    assert said["theme"] == other[scheme]
    assert int(said["ready"]) == len(re.findall(r'class="sortable"', page)) > 5
    assert said["wide"] == "false"


def test_a_phone_scrolls_down_and_not_sideways(content: Content, tmp_path: Path) -> None:
    """What is wider than the screen is scrolled in its own frame; all points of the first figure are in sight."""
    reader = """
const wide = [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll, .figure, pre") && e.getBoundingClientRect().right > innerWidth);
const first = document.querySelector(".chart");
const marks = [...first.querySelectorAll("circle")].map(e => e.getBoundingClientRect());
parent.document.body.setAttribute("data-said", [innerWidth, document.documentElement.scrollWidth, wide.length, marks.length,
  marks.filter(b => b.left >= 0 && b.right <= innerWidth).length].join(" "));
"""
    path, frame = tmp_path / "report.html", tmp_path / "frame.html"
    path.write_text(with_reader(render(content), reader), encoding="utf-8")
    frame.write_text(
        '<body><iframe src="report.html" style="width: 360px; height: 800px; border: 0"></iframe>'
    )
    page, _ = open_page(frame, tmp_path / "profile", "--allow-file-access-from-files")
    (said,) = re.findall(r'data-said="([^"]*)"', page)
    inner, scrolled, wide, marks, in_sight = map(int, said.split())
    assert inner == 360
    assert scrolled <= 360
    assert wide == 0
    assert in_sight == marks > 3


def test_no_script_but_its_own_runs(content: Content, tmp_path: Path) -> None:
    """Should markup ever slip in, the page's policy still keeps it from running."""
    path = tmp_path / "report.html"
    slipped = '<script>document.body.setAttribute("data-owned", "1")</script><img src=x onerror="document.body.dataset.owned=1">'
    path.write_text(render(content).replace("<main>", f"{slipped}<main>"), encoding="utf-8")
    page, console = open_page(path, tmp_path / "profile")
    assert "data-owned=" not in page.replace('"data-owned"', "")
    assert "Content Security Policy" in console


def test_screenshot(content: Content, tmp_path: Path) -> None:
    """Something is drawn: neither an empty page nor one colour."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    path, shot = tmp_path / "report.html", tmp_path / "shot.png"
    path.write_text(render(content), encoding="utf-8")
    open_page(path, tmp_path / "profile", f"--screenshot={shot}")
    with image.open(shot) as drawn:
        assert drawn.size == (1400, 2400)
        assert len(drawn.convert("RGB").getcolors(1 << 20)) > 50
