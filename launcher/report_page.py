"""The frame of `launch report`: the page, its style and its few lines of script. No network: the
policy in the head forbids what the page does not need anyway."""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,"><title>{title}</title><style>{style}</style></head>
<body><main>
{body}
</main><script>{script}</script></body></html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5c6675; --line: #dde2ea; --page: #f6f7f9;
 --card: #fff; --good: #14773c; --bad: #b3261e; --warn: #8a5a00; --k0: #0b62b5; --k1: #c24a00;
 --k2: #0a7f5c; --k3: #9b3f8f; --k4: #7a6a00; --k5: #2f8fc4; --k6: #8c564b; --k7: #5b5f97; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf1; --soft: #9aa5b6; --line: #2e3644;
 --page: #12161d; --card: #1a1f29; --good: #5fd08a; --bad: #ff8a80; --warn: #f0bf5a; --k0: #6cb6ff;
 --k1: #ff9a5c; --k2: #4fd1a5; --k3: #e29ad8; --k4: #d8c64f; --k5: #7fd4ff; --k6: #d3a297;
 --k7: #aab0ff; } }
body { margin: 0; background: var(--page); color: var(--ink);
 font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 10px; }
header, section, figure { background: var(--card); border: 1px solid var(--line);
 border-radius: 10px; padding: 18px 20px; margin: 0 0 16px; }
.phase { font-size: 14px; font-weight: 600; padding: 3px 10px; border-radius: 99px;
 vertical-align: middle; border: 1px solid currentColor; color: var(--soft); }
.succeeded, .passed b { color: var(--good); } .failed, .lost, .failed b { color: var(--bad); }
.cancelled, .preempted { color: var(--warn); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 10px 18px;
 margin: 14px 0 0; }
dt { color: var(--soft); font-size: 12.5px; } dd { margin: 0; overflow-wrap: anywhere; }
.gate { background: var(--card); border: 1px solid var(--line); border-left: 5px solid currentColor;
 border-radius: 8px; padding: 12px 16px; margin: 0 0 16px; }
p.gate { color: var(--ink); } p.gate.passed { border-left-color: var(--good); }
p.gate.failed { border-left-color: var(--bad); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: var(--soft); font-weight: 600; font-size: 12.5px;
 white-space: nowrap; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figcaption { font-weight: 600; font-size: 17px; margin-bottom: 8px; }
svg { width: 100%; height: auto; display: block; touch-action: pan-y; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
.guide { stroke: var(--soft); stroke-dasharray: 3 3; }
.tick, .label { fill: var(--soft); font-size: 12px; }
.curve path { fill: none; stroke: var(--k); stroke-width: 1.3; stroke-opacity: .6;
 stroke-linejoin: round; }
.curve.bold path { stroke-width: 2.4; stroke-opacity: 1; } .curve circle { fill: var(--k); }
.c0 { --k: var(--k0); } .c1 { --k: var(--k1); } .c2 { --k: var(--k2); } .c3 { --k: var(--k3); }
.c4 { --k: var(--k4); } .c5 { --k: var(--k5); } .c6 { --k: var(--k6); } .c7 { --k: var(--k7); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0 0; font-size: 13px; }
.legend i { display: inline-block; width: 20px; height: 0; border-top: 1.5px solid var(--k);
 vertical-align: middle; margin-right: 6px; opacity: .7; }
.legend .bold i { border-top-width: 3.5px; opacity: 1; }
.read { min-height: 1.5em; margin: 6px 0 0; font-size: 13px; color: var(--soft);
 font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; font-size: 13px; } summary { cursor: pointer; }
"""

SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const data = JSON.parse(svg.dataset.chart), [low, high, left, right] = data.x;
  const guide = svg.querySelector(".guide"), read = svg.parentNode.querySelector(".read");
  const nearest = (points, x) =>
    points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const x = low + (Math.min(Math.max(at, left), right) - left) / (right - left) * (high - low);
    const found = data.series.map(([name, points]) => [name, nearest(points, x)]);
    const step = nearest(found.map(item => item[1]), x)[0];
    const place = left + (step - low) / (high - low) * (right - left);
    guide.setAttribute("x1", place); guide.setAttribute("x2", place);
    read.textContent = `${data.label} ${step}:  ` + found.filter(([, p]) => p[0] === step)
      .map(([name, p]) => `${name} ${+p[1].toPrecision(5)}`).join("  ·  ");
  });
}
"""
