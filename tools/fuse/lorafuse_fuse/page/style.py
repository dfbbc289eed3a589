"""How the report looks: light, dark and printed, at any width; no font and nothing else is loaded."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbf9; --card: #ffffff; --ink: #1d2126; --soft: #5d6670; --line: #dfe2e3; --accent: #0b62a4;
  --s0: #e3eef8; --s1: #c4dcf0; --s2: #9bc5e3; --s3: #66a7d3; --s4: #3585bd; --s5: #12629f; --s6: #083f73;
  --g0: #cfe0dd; --g1: #abcfc8; --g2: #82b8ae; --w0: #f5c869; --w1: #ea9a3c; --w2: #cf5d1d; --w3: #8f2408;
  --over: #8663b5; --none: #e9ebeb; --mark: #a65a00;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1b1f23; --ink: #e6e8ea; --soft: #9aa4ae; --line: #31373d; --accent: #7dbdf0;
    --s0: #17293a; --s1: #1b3d5a; --s2: #21567f; --s3: #2f75a8; --s4: #4f98cb; --s5: #83bde6; --s6: #c3e2fb;
    --g0: #24423f; --g1: #2d5751; --g2: #39756a; --w0: #8a641a; --w1: #c07a21; --w2: #f0994a; --w3: #ffd0a8;
    --over: #b899e6; --none: #262b30; --mark: #f0b35a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 3rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 46rem; }
.soft, figcaption, .legend, th, dt, .row .kind { color: var(--soft); }
code, pre, .mono, .row .kind { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code, .mono { font-size: .86em; overflow-wrap: anywhere; }
pre {
  margin: .5rem 0 1rem; padding: .8rem 1rem; overflow-x: auto; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; font-size: .84rem; line-height: 1.5;
}
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.6rem 0; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.tile.warn b, .warn > b { color: var(--mark); }
.verdict { font-size: 1.08rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15.5rem), 1fr)); gap: .75rem; }
.card h3 { margin: 0 0 .1rem; }
.card .role { color: var(--soft); font-size: .8rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem .9rem; margin: .6rem 0 0; }
dl, ul.plain { font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.bar { display: block; height: 6px; margin-top: .7rem; border-radius: 3px; background: var(--none); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--accent); }
ul.plain { list-style: none; margin: .6rem 0 0; padding: 0; }
ul.plain li { padding-left: 1.1rem; text-indent: -1.1rem; }
ul.plain li::before { content: "\\2013\\2002"; color: var(--soft); }
ul.plain li.warn::before { content: "!\\2002"; color: var(--mark); font-weight: 700; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1.2rem 2.2rem; }
figure { margin: 0; min-width: 0; }
figcaption, .row { display: grid; grid-template-columns: minmax(0, 10.5rem) minmax(0, 1fr) 3.4rem; column-gap: .6rem; }
figcaption { font-size: .85rem; margin-bottom: .2rem; }
figcaption .name { grid-column: 1 / 3; color: var(--ink); font-weight: 600; }
.row { align-items: center; height: 19px; font-size: .78rem; }
.row .kind { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; font-size: .74rem; }
.row svg { display: block; width: 100%; height: 17px; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.axis { height: 1.1rem; color: var(--soft); }
.ticks { position: relative; height: 1.1rem; font-size: .7rem; }
.ticks span { position: absolute; transform: translateX(-50%); }
.legend { display: flex; flex-wrap: wrap; gap: .15rem .8rem; margin: .5rem 0 0; font-size: .75rem; }
.legend i, td i { display: inline-block; width: .9em; height: .9em; margin-right: .4em; border-radius: 2px; }
.legend i { vertical-align: -.1em; }
.s0 { fill: var(--s0); background: var(--s0); } .s1 { fill: var(--s1); background: var(--s1); }
.s2 { fill: var(--s2); background: var(--s2); } .s3 { fill: var(--s3); background: var(--s3); }
.s4 { fill: var(--s4); background: var(--s4); } .s5 { fill: var(--s5); background: var(--s5); }
.s6 { fill: var(--s6); background: var(--s6); }
.g0 { fill: var(--g0); background: var(--g0); } .g1 { fill: var(--g1); background: var(--g1); }
.g2 { fill: var(--g2); background: var(--g2); } .w0 { fill: var(--w0); background: var(--w0); }
.w1 { fill: var(--w1); background: var(--w1); } .w2 { fill: var(--w2); background: var(--w2); }
.w3 { fill: var(--w3); background: var(--w3); } .over { fill: var(--over); background: var(--over); }
.none { fill: var(--none); background: var(--none); }
rect:hover, circle:hover { stroke: var(--ink); stroke-width: 1; vector-effect: non-scaling-stroke; }
.chart { display: block; width: 100%; max-width: 34rem; height: auto; font-size: 12px; }
.chart text { fill: var(--soft); }
.chart .grid { stroke: var(--line); } .chart .limit { stroke: var(--mark); stroke-dasharray: 4 3; }
.chart .path { fill: none; stroke: var(--accent); stroke-width: 2; }
.chart .path ~ g circle, .chart .path ~ circle { fill: var(--accent); }
.scroll { overflow-x: auto; }
.narrow { max-width: 46rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; white-space: nowrap; }
td.number, th.number { padding-right: 0; padding-left: .8rem; }
td.name { overflow-wrap: break-word; min-width: 9.5rem; }
.steps .chart { max-width: 25rem; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--accent); }
ol { padding-left: 1.3rem; } ol li { margin: .3rem 0; max-width: 46rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .8rem; }
@media (max-width: 34rem) {
  main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem; }
  .tile b { font-size: 1.2rem; }
  figcaption, .row { grid-template-columns: minmax(0, 7.2rem) minmax(0, 1fr) 3rem; column-gap: .45rem; }
  .row .kind { font-size: .68rem; }
  td.name { font-size: .74rem; }
}
@media print {
  :root { --page: #fff; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; } figure, .card, .tile, tr { break-inside: avoid; }
  pre { white-space: pre-wrap; }
  rect, circle, i { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
