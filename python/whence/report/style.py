"""The look of pages and fragments."""

PAGE = """\
:root {
  color-scheme: light dark;
  --back: #fbfbfa; --sheet: #ffffff; --text: #1c2430; --soft: #566170; --line: #dfe3e8;
  --plus: #0a5aa8; --minus: #b3420b; --mark: #7a4b00; --mark-back: #fff1d2;
  --series-0: #0a5aa8; --series-1: #b3420b; --series-2: #7a3fa0; --series-3: #4d7c0f;
  --series-4: #6b7280;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #12161b; --sheet: #1a2027; --text: #e7ebf0; --soft: #a7b2bf; --line: #333d48;
    --plus: #79b8ff; --minus: #ff9d66; --mark: #ffd88a; --mark-back: #3d3013;
    --series-0: #79b8ff; --series-1: #ff9d66; --series-2: #d3a4f2; --series-3: #a3d65c;
    --series-4: #9aa5b1;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--back); color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
header, main, footer { max-width: 70rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
footer { padding-bottom: 2rem; color: var(--soft); font-size: .875rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1.05rem; line-height: 1.35; margin: 0 0 .5rem; }
h4 { font-size: .95rem; margin: 0 0 .5rem; }
p { margin: .5rem 0; max-width: 50rem; }
a { color: var(--plus); }
.soft { color: var(--soft); }
.plus { color: var(--plus); }
.minus { color: var(--minus); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; }
.sheet {
  background: var(--sheet); border: 1px solid var(--line); border-radius: 10px;
  padding: 1rem 1.15rem; margin: 1rem 0;
}
.legend dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.25rem; margin: 0; }
.legend dt { font-weight: 600; }
.legend dd { margin: 0; }
.query { display: grid; grid-template-columns: 11rem minmax(0, 1fr); gap: 1rem 1.5rem; }
.query.texts { grid-template-columns: minmax(0, 1fr); }
.side + .side { margin-top: 1.1rem; }
.gallery {
  list-style: none; margin: 0; padding: 0; display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr));
}
.gallery.texts { grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.gallery.texts { align-items: start; }
.gallery.texts .text { margin: .5rem 0 0; }
.card {
  border: 1px solid var(--line); border-radius: 8px; padding: .6rem; font-size: .875rem;
  overflow: hidden;
}
.card .name { color: var(--soft); font-size: .8rem; }
.score { font-weight: 700; font-variant-numeric: tabular-nums; font-size: 1rem; }
.notes { margin: .25rem 0 0; }
.notes div { display: flex; flex-wrap: wrap; column-gap: .4rem; }
.notes dt { color: var(--soft); }
.notes dd { margin: 0; font-weight: 600; }
.badge {
  display: inline-block; margin-top: .3rem; padding: 0 .5rem; border-radius: 999px;
  border: 1px solid currentColor; color: var(--mark); background: var(--mark-back);
  font-size: .78rem; font-weight: 600;
}
img { display: block; max-width: 100%; height: auto; border-radius: 4px; margin-bottom: .4rem; }
img.small { image-rendering: pixelated; }
.text { white-space: pre-wrap; margin: 0 0 .4rem; }
.text:has(+ details[open]) { display: none; }
details { margin: 0 0 .4rem; }
summary { cursor: pointer; color: var(--plus); }
.bar { display: block; width: 100%; height: 6px; margin: .2rem 0 .35rem; }
.bar .track { fill: var(--line); }
.bar .middle { fill: var(--soft); }
.bar .plus { fill: var(--plus); }
.bar .minus { fill: var(--minus); }
.beside {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: 0 2rem; align-items: start;
}
.beside figure { margin: .5rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { padding: .35rem 1.1rem .35rem 0; text-align: left; vertical-align: baseline; }
tr { border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; font-size: .875rem; }
tbody th { font-weight: 500; }
td.number { text-align: right; white-space: nowrap; }
th.number { text-align: right; overflow-wrap: normal; }
figure { margin: 1rem 0; }
figcaption { color: var(--soft); max-width: 46rem; }
.chart { width: 100%; max-width: 46rem; height: auto; display: block; }
.chart text { fill: var(--soft); font: 14px system-ui, "DejaVu Sans", sans-serif; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .axis { stroke: var(--soft); stroke-width: 1; }
.chart .guide { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 4; }
.curve { fill: none; stroke-width: 2.25; stroke-linejoin: round; }
.keys { list-style: none; padding: 0; margin: .25rem 0 .5rem; display: flex; flex-wrap: wrap;
  gap: .15rem 1.25rem; font-size: .875rem; }
.keys svg { width: 34px; height: 10px; vertical-align: middle; margin-right: .4rem; }
.series-0 { stroke: var(--series-0); }
.series-1 { stroke: var(--series-1); stroke-dasharray: 9 4; }
.series-2 { stroke: var(--series-2); stroke-dasharray: 2 4; }
.series-3 { stroke: var(--series-3); stroke-dasharray: 12 4 2 4; }
.series-4 { stroke: var(--series-4); stroke-dasharray: 5 5; }
@media (max-width: 44rem) {
  header, main, footer { padding-left: .9rem; padding-right: .9rem; }
  h1 { font-size: 1.4rem; }
  .query { grid-template-columns: minmax(0, 1fr); }
  .legend dl { grid-template-columns: 1fr; gap: 0; }
  .legend dd { margin-bottom: .5rem; }
  .gallery { grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr)); gap: .5rem; }
  th, td { padding-right: .8rem; }
}
@media print { .card, .query { break-inside: avoid; } }
"""

# A notebook has its own colours, light or dark: text takes them over, and the two hues stand out
# on both.
FRAGMENT = """\
.whence-hits dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1em; margin: 0; }
.whence-hits dt { font-weight: 600; }
.whence-hits dd { margin: 0; }
.whence-hits .whence-scroll { overflow-x: auto; }
.whence-hits table {
  color: inherit; font-size: inherit; border-collapse: collapse; margin: .75em 0;
}
.whence-hits caption { text-align: left; font-weight: 600; white-space: nowrap; }
.whence-hits th, .whence-hits td { text-align: left; padding: .15em .9em .15em 0; }
.whence-hits td.whence-number, .whence-hits th.whence-number {
  text-align: right; font-variant-numeric: tabular-nums;
}
.whence-hits svg { width: 60px; height: 6px; }
.whence-hits .track { fill: currentColor; opacity: .15; }
.whence-hits .middle { fill: currentColor; opacity: .5; }
.whence-hits .plus { fill: #3b86cc; }
.whence-hits .minus { fill: #d9692b; }
"""
