"""The page in a real browser: it fits a phone, can be read in light and dark, and nothing in it runs."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess

import pytest

from leannorm.report.html import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on this machine")

WIDTH = 360
ATTACK = "<img src=x onerror=\"parent.document.title='owned'\"><script>parent.document.title='owned'</script>"

# Contrast as WCAG 2.2 defines it, of every element that holds text of its own.
MEASURE = """
const inner = document.querySelector('iframe').contentDocument, view = inner.defaultView;
const channels = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
const luminance = colour => channels(colour)
  .map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const background = view.getComputedStyle(inner.body).backgroundColor;
const contrast = colour => {
  const [dark, light] = [luminance(colour), luminance(background)].sort((a, b) => a - b);
  return (light + 0.05) / (dark + 0.05);
};
const holdsText = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
const shown = [...inner.body.querySelectorAll('*')].filter(holdsText)
  .filter(e => !['title', 'desc'].includes(e.tagName));
const colour = e => view.getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color'];
const marks = [...inner.querySelectorAll('svg path[clip-path][style*="--series"]')]
  .map(e => view.getComputedStyle(e)).map(style => style.fill === 'none' ? style.stroke : style.fill);
document.body.textContent = JSON.stringify({
  background,
  contrast: Math.min(...shown.map(e => contrast(colour(e)))),
  markContrast: Math.min(...marks.map(contrast)),
  marks: marks.length,
  width: inner.documentElement.scrollWidth,
  charts: [...inner.querySelectorAll('svg')].map(e => e.getBoundingClientRect())
    .map(box => [box.left, box.right, box.height]),
  smallest: Math.min(...[...inner.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)),
  clipped: [...inner.querySelectorAll('svg text')].filter(e => {
    const box = e.getBoundingClientRect(), chart = e.closest('svg').getBoundingClientRect();
    return box.left < chart.left - 1 || box.right > chart.right + 1 || box.bottom > chart.bottom + 1;
  }).map(e => e.textContent),
  title: document.title,
});
"""


def measured(folder, content, *, dark):
    harness = folder / "harness.html"
    harness.write_text(
        f"<!doctype html><title>calm</title><body><iframe width={WIDTH} height=4000 style='border:0'"
        f' srcdoc="{html.escape(content)}"></iframe><script>onload = () => {{{MEASURE}}}</script>',
        encoding="utf-8",
    )
    command = [
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--user-data-dir={folder / 'profile'}",
        "--dump-dom",
        harness.as_uri(),
    ]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"<body>(\{.*\})", dumped, re.DOTALL)
    assert found, dumped[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_can_be_read_on_a_phone(tmp_path, deployment, dark):
    training = dataclasses.replace(deployment.training, statistics=ATTACK)
    several = [deployment, dataclasses.replace(deployment, training=training)]
    seen = measured(tmp_path, page(several), dark=dark)
    assert seen["title"] == "calm"
    assert seen["background"] == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    assert seen["contrast"] >= 4.5
    assert seen["marks"] == 2 + 2 + 6 + 4  # lines, lines, bars, bars
    assert seen["markContrast"] >= 3
    assert seen["width"] <= WIDTH
    assert len(seen["charts"]) == 4
    assert all(left >= 0 and right <= WIDTH and height > 60 for left, right, height in seen["charts"])
    assert seen["clipped"] == []
    assert seen["smallest"] >= 9
