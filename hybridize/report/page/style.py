"""The style sheet of the page: phone and desk, light and dark, paper."""

from __future__ import annotations

from hybridize.report.charts.style import CHART_STYLE

_PAGE = """
:root{color-scheme:light dark;--ground:#fff;--panel:#f6f6f8;--text:#1d1d1f;--muted:#5f5f66;--rule:#dcdce0;
--accent:#1f6fb4;--cool:#f1f5f9;--hot:#1a5f9e;--on-hot:#fff;--held:#ffb454}
@media screen and (prefers-color-scheme:dark){:root{--ground:#16161a;--panel:#1f1f24;--text:#ececee;--muted:#a3a3ab;
--rule:#38383f;--accent:#6cb2f0;--cool:#22252b;--hot:#7cc0fa;--on-hot:#0b1620;--held:#b36a00}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main,header{max-width:76rem;margin:0 auto;padding:0 1rem;overflow-wrap:break-word}
header{padding-top:1.5rem}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .5rem}
h2{font-size:1.3rem;margin:2.5rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.5rem 0 .4rem}
p{margin:.4rem 0;max-width:46rem}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1rem;list-style:none;margin:.5rem 0 0;padding:0;font-size:.9rem}
a{color:var(--accent)}
.note{color:var(--muted);font-size:.85rem}
.scroll{overflow-x:auto;max-width:100%;scrollbar-width:thin}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:right;white-space:nowrap;font-weight:400}
thead th{color:var(--muted);border-bottom:1px solid var(--rule);font-size:.8rem}
tbody th{text-align:left}thead th:first-child{text-align:left}
td>span{white-space:nowrap}
.plain tbody tr+tr>*{border-top:1px solid var(--rule)}
.figures,.maps{display:grid;gap:1.25rem 2rem;align-items:start;
grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr))}
.maps{display:flex;flex-wrap:wrap}
.parts{display:flex;flex-wrap:wrap;gap:0 3rem;align-items:flex-start}
.parts>*{flex:0 1 auto;min-width:0;max-width:100%}.parts>.words,.parts>.maps{flex-basis:100%}
.parts>.figures{flex:1 1 24rem;margin-top:.75rem}
figure{margin:.75rem 0 0;max-width:36rem;min-width:0}
.maps figure{max-width:100%}.maps .note{max-width:20rem}.table .note{max-width:34rem}
figure svg{display:block;width:100%;height:auto}
caption,figcaption{text-align:left;font-weight:600;font-size:.85rem;padding-bottom:.3rem}
.heat{border-collapse:separate;border-spacing:2px;font-size:.75rem}
.heat td{padding:.25rem .35rem;min-width:2.4rem;text-align:center;border-radius:3px;
background:color-mix(in srgb,var(--hot) calc(var(--v)*100%),var(--cool))}
.heat td.none{background:none;color:var(--muted)}.heat td.hot{color:var(--on-hot)}
.heat th{padding:.15rem .35rem;color:var(--muted)}.heat thead th{border:0;text-align:center;font-size:.75rem}
.heat thead th:first-child{text-align:left}
pre{background:var(--panel);padding:.75rem;border-radius:6px;white-space:pre-wrap;overflow-wrap:anywhere;
font-size:.85rem;max-width:60rem;margin:.25rem 0 1rem}
.tokens{background:var(--panel);padding:.75rem;border-radius:6px;white-space:pre-wrap;overflow-wrap:anywhere;
font:.9rem/1.9 ui-monospace,monospace;max-width:60rem}
.tokens span{background:color-mix(in srgb,var(--held) calc(var(--v)*100%),transparent);border-radius:2px;
padding:.15em 0}
.tokens .window{border-bottom:2px solid var(--accent)}
.tokens .break::before{content:"\\21b5";color:var(--muted)}
.choose{display:flex;flex-wrap:wrap;gap:.5rem 1rem;align-items:center;margin:.5rem 0}
select{font:inherit;padding:.25rem .4rem;background:var(--ground);color:var(--text);border:1px solid var(--rule);
border-radius:4px}
footer{height:3rem}
@media(max-width:40rem){.plain{font-size:.8rem}.plain th,.plain td{padding:.3rem .35rem}
.plain th,.plain .spread{white-space:normal}
.plain tbody th{min-width:6rem}.plain thead th{vertical-align:bottom}}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
@media print{body{font-size:10pt}
nav,.choose{display:none}h2{break-after:avoid}h3{break-after:avoid}
figure,tr,pre{break-inside:avoid}.scroll{overflow:visible}main,header{max-width:none;padding:0}th,td{white-space:normal}
.figures{grid-template-columns:1fr 1fr}}
"""

STYLE = _PAGE.strip() + "\n" + CHART_STYLE
