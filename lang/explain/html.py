"""A drawing as one HTML page: the image, and a panel with all details of the opened card.

The page has no external resources and works from a file, without a network. Arrow keys move along the edges; Escape
closes the panel.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from ramet.lang.explain.cards import Card
from ramet.lang.explain.svg import DARK, DARK_HUES, LIGHT, LIGHT_HUES, RULES, to_svg, variables

_STYLE = """
* { box-sizing: border-box; }
html, body { height: 100%; margin: 0; background: var(--bg); color: var(--ink); }
body { display: flex; font: 14px/1.5 Inter, "Segoe UI", system-ui, -apple-system, "Helvetica Neue", sans-serif; }
#picture { flex: 1; overflow: auto; cursor: grab; min-width: 0; }
#picture.moving { cursor: grabbing; user-select: none; }
#picture svg { display: block; min-width: max-content; }
#picture .card { cursor: pointer; outline: none; transition: opacity .15s; }
#picture .prefix, #picture .join, #picture .use { transition: opacity .15s; }
#picture.chosen .card:not(.near) { opacity: .38; }
#panel { width: 400px; max-width: 45vw; border-left: 1px solid var(--faint); background: var(--card); overflow: auto;
  padding: 22px 24px 40px; display: none; }
#panel.open { display: block; }
#panel h2 { margin: 2px 0 0; font-size: 18px; letter-spacing: -.01em; }
#panel .kind { color: var(--hue); font-size: 11px; font-weight: 650; letter-spacing: .08em; text-transform: uppercase; }
#panel .where, #panel dt, #panel h3 { color: var(--soft); }
#panel h3 { margin: 22px 0 6px; font-size: 11px; font-weight: 650; letter-spacing: .06em; text-transform: uppercase; }
#panel pre { margin: 0; padding: 12px 14px; border-radius: 8px; background: var(--bg); white-space: pre-wrap;
  overflow-wrap: anywhere; font: 12px/1.55 "JetBrains Mono", "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
#panel pre.written { border-left: 3px solid var(--hue); border-radius: 0 8px 8px 0; }
#panel dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; }
#panel dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
#panel .bar { display: flex; height: 8px; border-radius: 4px; overflow: hidden; background: var(--track);
  margin: 4px 0 10px; }
#panel .bar i { display: block; background: var(--hue); }
#panel .bar i.cached { opacity: .28; }
#panel .bar i.written { background: var(--ink); opacity: .8; }
#panel .bad { color: #e5484d; }
button { position: fixed; top: 16px; right: 18px; z-index: 2; width: 34px; height: 34px; border-radius: 17px;
  border: 1px solid var(--faint); background: var(--card); color: var(--ink); font-size: 15px; cursor: pointer; }
"""

_SCRIPT = """
const cards = JSON.parse(document.getElementById("cards").textContent);
const picture = document.getElementById("picture"), panel = document.getElementById("panel");
const box = (id) => picture.querySelector(`[data-card="${id}"]`);
const add = (parent, tag, text, style) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (style) element.className = style;
  parent.append(element);
  return element;
};
const ms = (value) => (value * 1000).toLocaleString("en", {maximumFractionDigits: 1}) + " ms";
let chosen = null;

function close() {
  chosen = null;
  panel.className = "";
  picture.classList.remove("chosen");
  picture.querySelectorAll(".card").forEach((one) => one.classList.remove("open", "near"));
}

function open(id) {
  close();
  chosen = id;
  const card = cards[id];
  panel.className = "open h" + card.hue;
  panel.replaceChildren();
  add(panel, "div", card.kind, "kind");
  add(panel, "h2", card.name || card.kind);
  add(panel, "div", card.line, "where");
  if (card.error) add(panel, "p", card.error, card.is_cancelled ? "" : "bad");
  if (card.cached !== null) {
    add(panel, "h3", "tokens");
    const sizes = [["cached", card.cached], ["computed", card.computed], ["written", card.written || 0]];
    const total = sizes.reduce((sum, [, size]) => sum + size, 0) || 1;
    const bar = add(panel, "div", undefined, "bar");
    sizes.forEach(([name, size]) => { add(bar, "i", "", name).style.width = 100 * size / total + "%"; });
    add(panel, "div", card.label);
  }
  if (card.num_readers > 1) {
    add(panel, "h3", "prefix");
    add(panel, "div", (card.prefix_tokens ? card.prefix_tokens + " tokens, " : "") +
      "read by " + card.num_readers + " requests, computed once");
  }
  if (card.end_s !== null && card.start_s !== null) {
    add(panel, "h3", "times since the start");
    const list = add(panel, "dl");
    const times = [["asked for", card.start_s], ["first token", card.first_token_s], ["done", card.end_s]];
    times.forEach(([name, value]) => {
      if (value === null) return;
      add(list, "dt", name);
      add(list, "dd", ms(value));
    });
  }
  if (card.prompt) { add(panel, "h3", "text"); add(panel, "pre", card.prompt); }
  if (card.written_text) { add(panel, "h3", "written"); add(panel, "pre", card.written_text, "written"); }
  if (card.probs) { add(panel, "h3", "probabilities"); add(panel, "div", card.probs); }
  const near = new Set([id, ...card.joins, ...card.uses]);
  for (let at = card.parent; at !== null; at = cards[at].parent) near.add(at);
  cards.forEach((one) => {
    if (one.parent === id || one.joins.includes(id) || one.uses.includes(id)) near.add(one.id);
  });
  near.forEach((one) => box(one).classList.add("near"));
  box(id).classList.add("open");
  picture.classList.add("chosen");
}

function fit() {  // a wide picture is made smaller, as far as it can still be read
  const svg = picture.querySelector("svg"), [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  const scale = Math.min(1, Math.max(0.6, picture.clientWidth / width));
  svg.setAttribute("width", width * scale);
  svg.setAttribute("height", height * scale);
}
fit();
window.addEventListener("resize", fit);

let start = null, moved = false;
picture.addEventListener("pointerdown", (event) => {
  start = [event.clientX + picture.scrollLeft, event.clientY + picture.scrollTop];
  moved = false;
});
window.addEventListener("pointermove", (event) => {
  if (!start) return;
  const [x, y] = [start[0] - event.clientX, start[1] - event.clientY];
  if (Math.abs(x - picture.scrollLeft) + Math.abs(y - picture.scrollTop) > 4) moved = true;
  if (moved) { picture.classList.add("moving"); picture.scrollTo(x, y); }
});
window.addEventListener("pointerup", () => { start = null; picture.classList.remove("moving"); });
picture.addEventListener("click", (event) => {
  if (moved) return;
  const found = event.target.closest("[data-card]");
  found ? open(Number(found.dataset.card)) : close();
});
picture.addEventListener("focusin", (event) => {
  const found = event.target.closest("[data-card]");
  if (found && found.matches(":focus-visible")) open(Number(found.dataset.card));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") close();
  if (chosen === null) return;
  const next = cards.find((one) => one.parent === chosen);
  if (event.key === "ArrowLeft" && cards[chosen].parent !== null) open(cards[chosen].parent);
  if (event.key === "ArrowRight" && next) open(next.id);
});
document.querySelector("button").addEventListener("click", () => {
  const isDark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = isDark ? "light" : "dark";
});
const given = new URLSearchParams(location.hash.slice(1));
if (given.has("theme")) document.documentElement.dataset.theme = given.get("theme");
if (given.has("card") && cards[Number(given.get("card"))]) open(Number(given.get("card")));
"""


def to_html(program: str, summary: str, cards: Sequence[Card]) -> str:
    """Return the page. `summary`: one line about the whole program."""
    shown = json.dumps([card.to_dict() for card in cards], ensure_ascii=False).replace("<", "\\u003c")
    hues = "\n".join(f".h{i} {{ --hue: var(--hue{i}); }}" for i in range(len(LIGHT_HUES)))
    light, dark = variables(LIGHT, LIGHT_HUES), variables(DARK, DARK_HUES)
    themes = (
        f":root {{ {light} color-scheme: light; }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} color-scheme: dark; }} }}\n"
        f":root[data-theme=light] {{ {light} color-scheme: light; }}\n"
        f":root[data-theme=dark] {{ {dark} color-scheme: dark; }}\n"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(program)} · Ramet</title>\n<style>\n{themes}{RULES}{hues}\n{_STYLE}</style></head>\n"
        f'<body><main id="picture">{to_svg(program, summary, cards, is_embedded=True)}</main><aside id="panel"></aside>'
        '<button title="light or dark" aria-label="light or dark">'
        '<svg width="14" height="14" viewBox="0 0 14 14"><circle cx="7" cy="7" r="6" fill="none" stroke="currentColor" '
        'stroke-width="1.5"/><path d="M7 1a6 6 0 0 1 0 12z" fill="currentColor"/></svg></button>\n'
        f'<script type="application/json" id="cards">{shown}</script>\n<script>{_SCRIPT}</script></body></html>\n'
    )
