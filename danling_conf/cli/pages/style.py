"""Style sheet of all pages. Colours are variables: one set for light, and one for dark."""

from __future__ import annotations

COLOURS = 8
"""Number of distinct colours of series; further series repeat them."""

STYLE = """
:root{color-scheme:light dark;--back:#fbfbfa;--card:#fff;--ink:#1c1f23;--soft:#5d6672;--line:#e3e5e8;--grid:#eceef0;
--accent:#2563c9;--good:#1a7f4b;--bad:#c2372e;--busy:#a86400;
--s0:#2563c9;--s1:#d9722b;--s2:#1a8a64;--s3:#b8407f;--s4:#8a6a00;--s5:#6d54c4;--s6:#0d8296;--s7:#7a7f87}
@media (prefers-color-scheme:dark){:root{--back:#14171a;--card:#1c2024;--ink:#e6e8ea;--soft:#9aa4af;--line:#30363d;
--grid:#272c32;--accent:#6ea8fe;--good:#57c28d;--bad:#f0857b;--busy:#e0aa52;
--s0:#6ea8fe;--s1:#f2a065;--s2:#5cc9a3;--s3:#ea86bb;--s4:#d8b94e;--s5:#ab98f0;--s6:#58c4d6;--s7:#a5abb3}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.6rem;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:0 0 12px}
.subtitle,.note{color:var(--soft);margin:4px 0 0;overflow-wrap:anywhere}
section>.note{margin:-8px 0 12px}
section{margin-top:30px}
a{color:var(--accent)}
.grid{display:grid;gap:16px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,calc(100%/var(--columns) -
16px)),1fr))}
@media (max-width:760px){.grid{grid-template-columns:minmax(0,1fr)}}
.chart,.tiles .tile,.scroll,.facts,details{background:var(--card);border:1px solid var(--line);border-radius:8px}
.chart{margin:0;padding:12px 14px 8px;min-width:0}
.chart figcaption{font-weight:600;font-size:.92rem;display:flex;flex-wrap:wrap;gap:4px 14px;align-items:baseline}
.chart svg{display:block;width:100%;height:auto;overflow:visible;touch-action:pan-y}
.legend{display:inline-flex;flex-wrap:wrap;gap:2px 12px;font-weight:400;font-size:.82rem;color:var(--soft)}
.legend i{display:inline-block;width:12px;height:3px;border-radius:2px;margin-right:5px;vertical-align:middle}
.axis{fill:var(--soft);font-size:11.5px;font-variant-numeric:tabular-nums}
.rule{stroke:var(--grid)}.base{stroke:var(--line)}
.path{fill:none;stroke-width:1.75;stroke-linejoin:round;stroke-linecap:round}
.run:hover{stroke-width:3.5;stroke-opacity:1}
.wide{grid-column:1/-1}
.chosen{fill:var(--accent);fill-opacity:.14;pointer-events:none}
.mark{stroke:var(--card);stroke-width:1.2}
.cross{stroke:var(--soft);stroke-dasharray:3 3}
.bar{stroke:var(--card);stroke-width:1}
.empty{color:var(--soft);padding:24px 0;text-align:center}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(165px,1fr));gap:12px}
.tile{padding:12px 14px;display:flex;flex-direction:column;min-width:0}
.tile .label{color:var(--soft);font-size:.82rem}
.tile .value{font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tile .note{font-size:.8rem;margin:0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th,td{padding:7px 14px;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
tbody tr:last-child td{border-bottom:0}
tbody tr:hover{background:var(--grid)}
th{color:var(--soft);font-weight:600;cursor:pointer;user-select:none}
.number{text-align:right;font-variant-numeric:tabular-nums}
.facts{display:grid;
grid-template-columns:minmax(120px,max-content) minmax(0,1fr);gap:4px 18px;margin:0;padding:12px
14px; font-size:.9rem} .facts dt{color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere} details{padding:10px
14px;margin-top:12px} summary{cursor:pointer;font-weight:600;font-size:.92rem}
details>*:not(summary){margin-top:10px;border:0} pre{margin:0;padding:12px 14px;font:12.5px/1.5 ui-monospace,"SF
Mono",Menlo,monospace;
max-height:480px;overflow:auto} .badge{
border:1px solid var(--line);border-radius:99px;padding:1px
9px;font-size:.8rem;color:var(--soft);font-weight:500}
.badge.good{color:var(--good);border-color:currentColor}.badge.bad{color:var(--bad);border-color:currentColor}
.badge.busy{color:var(--busy);border-color:currentColor}
#tip{position:fixed;z-index:9;pointer-events:none;background:var(--card);color:var(--ink);border:1px solid var(--line);
border-radius:6px;padding:6px 10px;font-size:.8rem;box-shadow:0 4px 14px #0003;display:none;max-width:340px;
font-variant-numeric:tabular-nums;white-space:pre-line;overflow-wrap:anywhere}
@media print{#tip{display:none}section{break-inside:avoid}}
"""
