"""The look of a page: one style sheet, light and dark, for a phone, a screen and paper. No font or file is fetched."""

SHEET = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1f2933; --muted: #5d6975; --rule: #dcdfe3;
  --blue: #0072b2; --orange: #c65102; --green: #00805e; --shade: 0, 114, 178; --most: .7;
  --good: #00734f; --bad: #b3430a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --card: #1c2229; --ink: #e6e9ec; --muted: #9aa6b2; --rule: #343d47;
    --blue: #5cb3e6; --orange: #f2914a; --green: #3cc79c; --shade: 92, 179, 230; --most: .55;
    --good: #4fd1a5; --bad: #f7a06b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
.panes { display: flex; height: .6rem; }
.panes i { flex: 1; border-right: 2px solid var(--paper); }
header, main, footer { max-width: 62rem; margin: 0 auto; padding: 0 1.1rem; }
header { padding-top: 2rem; }
h1, h2, h3 { font-family: "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, serif; line-height: 1.2; }
h1 { font-size: clamp(1.7rem, 5vw, 2.5rem); margin: .2rem 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.45rem; margin: 3rem 0 .6rem; padding-top: 1.1rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; }
#summary h2 { border-top: 0; margin-top: 1rem; }
p { max-width: 44rem; margin: .5rem 0 .9rem; }
.kicker { color: var(--muted); font-size: .82rem; letter-spacing: .1em; text-transform: uppercase; margin: 0; }
.meta, figcaption, footer, .small { color: var(--muted); font-size: .9rem; }
.lead { font-size: 1.1rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1rem 0 0; font-size: .92rem; }
a { color: var(--blue); }
a:focus-visible, summary:focus-visible, .wide:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .9rem; margin: 1.3rem 0; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; padding: .8rem 1rem; }
.tile dt { color: var(--muted); font-size: .88rem; }
.tile dd { margin: 0; }
.tile .value { font: 600 1.9rem/1.2 Georgia, serif; font-variant-numeric: lining-nums tabular-nums; }
.meter { position: relative; height: .45rem; background: var(--rule); border-radius: .3rem; margin: .45rem 0; }
.meter i { position: absolute; inset: 0 auto 0 0; background: var(--blue); border-radius: .3rem; }
.meter b { position: absolute; top: -.2rem; bottom: -.2rem; width: 3px; margin-left: -1px; background: var(--ink); }
.notes { border-left: 4px solid var(--orange); background: var(--card); padding: .3rem 1.1rem; margin: 1.2rem 0; }
.notes ul { padding-left: 1.1rem; max-width: 44rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
.charts figure { margin: 0; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; display: block; border-radius: .25rem; }
figure svg { width: 100%; height: auto; display: block; }
.split { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 0 2.5rem; }
.split > * { min-width: 0; max-width: 30rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: .9rem; padding-bottom: .4rem; }
th, td { padding: .4rem .8rem; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: middle; }
th { font-weight: 600; }
thead th { color: var(--muted); font-size: .88rem; vertical-align: bottom; }
th[scope=row], thead th:first-child { text-align: left; padding-left: 0; min-width: 6rem; }
.word { display: inline-block; max-width: 16rem; overflow-wrap: break-word; vertical-align: bottom; }
.bar { min-width: 7.5rem; }
.bar .meter { margin: .15rem 0 0; height: .35rem; }
.matrix td {
  text-align: center; min-width: 4.6rem; border: 2px solid var(--paper); padding: .55rem .4rem;
  background: rgba(var(--shade), calc(var(--most) * var(--strength, 0)));
}
.matrix thead th { text-align: center; padding: .4rem; }
.matrix .word { max-width: 8rem; }
.matrix th[scope=row] { border: 0; }
.matrix thead td { border: 0; min-width: 0; text-align: left; color: var(--muted); font-size: .82rem; }
.matrix small { display: block; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); gap: 1rem; }
.example {
  margin: 0; background: var(--card); border: 1px solid var(--rule); border-top: 4px solid var(--good);
  border-radius: .5rem; padding: .7rem;
}
.example.wrong { border-top-color: var(--bad); }
.pair { display: flex; gap: .4rem; }
.pair img { flex: 1; min-width: 0; width: 50%; max-height: 20rem; object-fit: contain; align-self: flex-start; }
.example figcaption { margin-top: .6rem; color: var(--ink); overflow-wrap: anywhere; }
.verdict { font-weight: 600; color: var(--good); }
.wrong .verdict { color: var(--bad); }
.example ol { list-style: none; margin: .45rem 0 0; padding: 0; font-size: .86rem; }
.example li { display: grid; grid-template-columns: 1fr 3.2rem; gap: 0 .6rem; }
.example li .meter { grid-column: 1 / -1; margin: .1rem 0 .3rem; height: .25rem; }
.example li span:nth-child(2) { text-align: right; font-variant-numeric: tabular-nums; }
.scale { display: inline-block; width: 8rem; height: .7rem; border-radius: .2rem; vertical-align: baseline;
  margin: 0 .4rem; background: linear-gradient(90deg, #000004, #420a68, #932667, #dd513a, #fca50a, #fcffa4); }
code span { white-space: nowrap; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.2rem; }
dl.facts dt { color: var(--muted); }
dl.facts dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
code {
  font: .9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; display: block; overflow-x: auto;
  background: var(--card); border: 1px solid var(--rule); border-radius: .3rem; padding: .3rem .6rem;
}
footer { padding-top: 2rem; padding-bottom: 3rem; }
@media (max-width: 34rem) {
  dl.facts { grid-template-columns: 1fr; gap: 0; } dl.facts dd { margin-bottom: .6rem; }
  th, td { padding: .35rem .3rem; } .bar { min-width: 3.4rem; } .matrix td { min-width: 3.6rem; }
  .word { max-width: 8rem; } .matrix .word { max-width: 6rem; }
}
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --muted: #444; --rule: #bbb; --blue: #0072b2;
    --orange: #c65102; --green: #00805e; --shade: 0, 114, 178; --most: .7; --good: #00734f; --bad: #b3430a;
    color-scheme: light; }
  body { font-size: 10.5pt; } nav { display: none; } h2 { margin-top: 1.6rem; }
  h2, h3, caption { break-after: avoid; } .split { display: block; }
  figure, .tile, tr, .example { break-inside: avoid; } .wide { overflow: visible; }
  .split > .wide { max-width: none; } .matrix { font-size: 7.5pt; } .matrix td { min-width: 0; padding: .3rem .2rem; }
  .examples, .charts { grid-template-columns: repeat(3, 1fr); }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
PANES = ("#0b4f8a", "#2a9d8f", "#e9b44c", "#b5293c", "#5b3a8c", "#1f7a4d", "#d9722e", "#0b4f8a", "#b5293c", "#e9b44c")
"""the colours of the strip of glass at the top of a page"""
