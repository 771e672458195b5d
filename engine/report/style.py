"""The style sheet of the report."""

from __future__ import annotations

from hotloop.engine.report.curves import INKS

_LIGHT = " ".join(f"--{ink}: {colour};" for ink, colour in INKS.items())

STYLE = (
    f":root {{ {_LIGHT} --page: #ffffff; --panel: #f6f7f9; }}"
    """
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e8eb; --muted: #9aa1ab; --rule: #33383f; --faint: #3c5589; --model: #7fa6f8; --held: #f59e5b;
    --part1: #a78bfa; --part2: #6f98f2; --part3: #3fbfab; --part4: #eba544; --part5: #e0709a; --part6: #a9c64b;
    --part7: #6b727d; --count: #59606b; --page: #15181c; --panel: #1d2126;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 58rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { font-size: 2rem; line-height: 1.15; letter-spacing: -0.015em; margin: 0.1rem 0 0.3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; line-height: 1.3; letter-spacing: -0.005em; margin: 0 0 0.8rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 0.4rem; }
p { max-width: 42rem; margin: 0.6rem 0; }
.kind, .status { color: var(--muted); margin: 0; }
.kind { font-size: 0.875rem; }
section { margin-top: 2.6rem; padding-top: 1.3rem; border-top: 1px solid var(--rule); }
section > p { color: var(--muted); font-size: 0.9375rem; }
section > p.verdict { color: var(--ink); font-size: 1.0625rem; }
.headline { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1.3rem 1.5rem; margin: 2rem 0 0; }
.headline div { border-top: 2px solid var(--ink); padding-top: 0.45rem; display: flex; flex-direction: column-reverse;
  justify-content: flex-end; }
.headline dt { color: var(--muted); font-size: 0.875rem; line-height: 1.35; }
.headline dd {
  margin: 0; font-size: 1.75rem; line-height: 1.2; font-weight: 600; letter-spacing: -0.015em;
  font-variant-numeric: tabular-nums;
}
figure { margin: 0.8rem 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure h3 { margin: 0 0 0.5rem; font-size: 0.875rem; font-weight: 600; }
svg text { font-family: inherit; font-size: 7.5px; font-variant-numeric: tabular-nums; }
.pair svg text { font-size: 9.5px; }
figcaption {
  display: flex; flex-wrap: wrap; gap: 0.2rem 1.4rem; margin-top: 0.4rem; color: var(--muted); font-size: 0.875rem;
}
figcaption i { display: inline-block; width: 1.1em; height: 3px; margin-right: 0.5em; vertical-align: 0.27em; }
.bars { width: 100%; margin: 1rem 0; }
.bars th, .bars td { border: 0; padding: 0.2rem 0; vertical-align: middle; white-space: nowrap; }
.bars th { padding-right: 0.9rem; width: 1%; }
.bars td:last-child { padding-left: 0.7rem; width: 1%; text-align: right; }
.bars .model { font-weight: 600; }
.bars .model th { font-weight: 600; }
.bars i { display: block; height: 1.15rem; border-radius: 0 2px 2px 0; }
.stack { display: flex; height: 1.6rem; margin: 0.4rem 0 1rem; border-radius: 3px; overflow: hidden; }
.stack i { display: block; flex: none; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0.5rem 2rem; }
table { border-collapse: collapse; font-size: 0.9375rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 400; }
th, td { padding: 0.28rem 1.5rem 0.28rem 0; vertical-align: top; border-bottom: 1px solid var(--rule); }
td { overflow-wrap: anywhere; }
.numbers td { text-align: right; padding-right: 0; padding-left: 1.5rem; white-space: nowrap; }
.numbers i { display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.6em; border-radius: 2px; }
.numbers .sum th, .numbers .sum td { border-bottom: 0; font-weight: 600; }
.facts th { color: var(--muted); width: 15rem; }
.facts { width: 100%; }
.events th { color: var(--muted); font-size: 0.875rem; }
.events td:first-child { text-align: right; padding-right: 1.25rem; }
.events td:nth-child(2) { white-space: nowrap; }
.scroll { overflow-x: auto; }
pre {
  margin: 0.7rem 0; padding: 0.85rem 1rem; background: var(--panel); border-radius: 4px; overflow-x: auto;
  font: 0.8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; tab-size: 4;
}
@media (max-width: 40rem) {
  body { padding-top: 1.5rem; }
  .headline { grid-template-columns: repeat(2, 1fr); }
  .pair { grid-template-columns: minmax(0, 1fr); }
  svg text { font-size: 14px; }
  .pair svg text { font-size: 10.5px; }
  .facts th { width: 40%; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
@media print {
  @page { margin: 16mm; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  section { margin-top: 1.4rem; padding-top: 0.9rem; }
  figure, .headline, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--rule); background: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
)
