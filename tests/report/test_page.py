"""The report's page in a real browser: images, width, contrast and sections, on a desktop and on a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ditfast.bench.report.data import Run, gather
from ditfast.bench.report.write import render
from tests.report.conftest import everything, results, twelve_models

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# before anything else, so that no error escapes
WATCH = "<script>window.errors = []; addEventListener('error', e => errors.push(String(e.message)), true);</script>"
# what the page is asked, and tells the page around it
ASK = """<script>addEventListener('load', () => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const contrast = element => {
    const [a, b] = [rgb(getComputedStyle(element).color), behind(element)].map(light);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const read = [...document.querySelectorAll('h1,h2,h3,p,a,dt,dd,th,td,summary,figcaption')];
  const worst = read.map(e => [contrast(e), e.tagName + '.' + e.className]).sort((x, y) => x[0] - y[0])[0];
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll *'))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.tagName);
  parent.postMessage(JSON.stringify({
    errors, wide, contrast: worst, width: innerWidth, scroll: document.documentElement.scrollWidth,
    background: behind(document.body),
    images: [...document.images].map(i => [i.complete && i.naturalWidth, i.getBoundingClientRect().width, i.alt]),
    sections: [...document.querySelectorAll('section')].map(s => s.id),
    tables: document.querySelectorAll('table').length,
    rows: document.querySelectorAll('tbody tr').length,
  }), '*');
});</script>"""
# a window is never narrower than 500 pixels, a frame is
AROUND = """<!doctype html><style>:root { color-scheme: light dark; } iframe { border: 0; }</style>
<script>addEventListener('message', e => {
  const frame = [...document.querySelectorAll('iframe')].findIndex(f => f.contentWindow === e.source);
  document.querySelectorAll('pre')[frame].textContent = e.data;
});</script>"""
FRAME = '<pre class="answer"></pre><iframe src="{page}" width="{width}" height="900"></iframe>'
# a page with every fault
FAULTY = "<p style='color:#999'>grey</p><div style='width:2000px'>wide</div><img src='data:image/png;base64,AAAA'>"


@pytest.fixture(scope="module")
def browser() -> str:
    path = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"needs a headless browser; none of {', '.join(BROWSERS)} is on the PATH")
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of every suite and a comparison, with the questions in it; a faulty page lies beside it."""
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra bench")
    runs = [Run(f"{i}.json", item) for i, item in enumerate(everything())]
    text = render(gather(runs, [Run("old.json", twelve_models())]))["report.html"].decode()
    path = tmp_path_factory.mktemp("page") / "asked.html"
    path.write_text(text.replace("<head>", "<head>" + WATCH).replace("</body>", ASK + "</body>"), encoding="utf-8")
    faulty = f"<head>{WATCH}</head><body>{FAULTY}<script>none()</script>{ASK}</body>"
    path.with_name("faulty.html").write_text(faulty, encoding="utf-8")
    return path


def ask(browser: str, frames: Sequence[tuple[Path, int]], *options: str) -> list[dict[str, Any]]:
    """The answers of pages, each in a frame of a width, by one start of the browser."""
    folder = frames[0][0].parent / f"profile-{len(frames)}-{len(options)}"
    folder.mkdir()
    around = folder.with_suffix(".html")
    around.write_text(AROUND + "".join(FRAME.format(page=page.name, width=width) for page, width in frames))
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [f"--user-data-dir={folder}", "--virtual-time-budget=20000", "--window-size=1400,1000", *options]
    ran = subprocess.run([*command, "--dump-dom", around.as_uri()], capture_output=True, timeout=240, check=False)
    answers = re.findall(r'<pre class="answer">(.+?)</pre>', ran.stdout.decode(), re.DOTALL)
    assert len(answers) == len(frames), ran.stderr.decode()[-2000:]
    return [json.loads(html.unescape(answer)) for answer in answers]


@pytest.fixture(scope="module")
def answers(browser: str, page: Path) -> dict[str, dict[str, Any]]:
    """Of the page on a desktop, on a phone and in the dark, and of the faulty one."""
    desktop, phone, faulty = ask(browser, [(page, 1280), (page, 390), (page.with_name("faulty.html"), 1280)])
    [dark] = ask(browser, [(page, 1280)], "--blink-settings=preferredColorScheme=0")
    return {"desktop": desktop, "phone": phone, "dark": dark, "faulty": faulty}


@pytest.mark.subprocess
@pytest.mark.parametrize(("name", "width"), [("desktop", 1280), ("phone", 390), ("dark", 1280)])
def test_the_page_is_readable(name: str, width: int, answers: dict[str, dict[str, Any]]) -> None:
    answer = answers[name]
    assert answer["errors"] == []
    assert answer["width"] == width
    assert (max(answer["background"]) < 60) == (name == "dark")
    # what is wider scrolls in a container of its own
    assert answer["scroll"] <= width and answer["wide"] == []
    assert len(answer["images"]) == 10
    for natural, shown, alt in answer["images"]:
        # 150 dots an inch against 96: the letters keep their size
        assert natural > 0 and shown == pytest.approx(natural * 96 / 150, abs=2) and len(alt) > 20
    sections = ["machine-1", "machine-2", "computed", "comparison", "definitions"]
    assert answer["sections"] == sections
    rows = sum(len(item.rows) for item in everything())
    assert answer["rows"] > rows and answer["tables"] == 9
    assert answer["contrast"][0] >= 4.5, answer["contrast"]


@pytest.mark.subprocess
def test_the_questions_find_every_fault(answers: dict[str, dict[str, Any]]) -> None:
    """On a page with every fault; otherwise the test above would prove nothing."""
    answer = answers["faulty"]
    assert any("none is not defined" in error for error in answer["errors"])
    assert answer["wide"] == ["DIV"] and answer["scroll"] > 1280
    assert answer["contrast"][0] == pytest.approx(2.85, abs=0.01)
    assert not answer["images"][0][0] and answer["sections"] == []


def test_an_empty_suite_renders() -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra bench")
    assert b"Nothing was measured." in render(gather([Run("0.json", results("models", []))]))["report.html"]
