"""A drawing as SVG. Colours are style-sheet variables, so that one file serves light and dark."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from html import escape

from rich.cells import cell_len

from ramet.lang.explain.cards import Card

WIDTH, HEIGHT = 272, 128  # of a card, in pixels
GAP_X, GAP_Y = 64, 26
LEFT, TOP, BOTTOM = 36, 92, 46
CHARS = 37  # of monospaced text in one line of a card
LEGEND = 820  # its width
TIME_ROW, TIME_LABEL = 14, 130  # of the timeline: a row's height, and the width of its names

LIGHT = {
    "bg": "#fbfbfd",
    "card": "#ffffff",
    "ink": "#1b2030",
    "soft": "#646b7e",
    "faint": "#d9dce6",
    "track": "#eceef4",
    "shadow": "#1b203018",
}
DARK = {
    "bg": "#11141c",
    "card": "#1a1f2b",
    "ink": "#eceef6",
    "soft": "#98a1b8",
    "faint": "#343b4d",
    "track": "#272d3b",
    "shadow": "#00000060",
}
LIGHT_HUES = ("#3d6ae0", "#e0662a", "#1c9a63", "#a347c2", "#b98900", "#0b93a8", "#d43d63", "#6f8f22")
DARK_HUES = ("#7b9dff", "#ff9a63", "#4fd08f", "#d489ee", "#e8c04c", "#4ccbdd", "#ff7d9b", "#aacb57")

RULES = """
.rm { background: var(--bg); font-family: Inter, "Segoe UI", system-ui, -apple-system, "Helvetica Neue", sans-serif; }
.rm .card rect.box { fill: var(--card); stroke: var(--faint); stroke-width: 1; }
.rm .card.open rect.box, .rm .card:hover rect.box { stroke: var(--hue); stroke-width: 1.6; }
.rm .card { filter: drop-shadow(0 1.5px 3px var(--shadow)); }
.rm .title { font-size: 13px; font-weight: 650; fill: var(--ink); }
.rm .kind { font-size: 9.5px; font-weight: 650; letter-spacing: .08em; fill: var(--hue); }
.rm .line, .rm .label, .rm .time { font-size: 10px; fill: var(--soft); }
.rm .mono { font-family: "JetBrains Mono", "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.rm .prompt { font-size: 10.5px; fill: var(--soft); }
.rm .role { font-weight: 650; }
.rm .role.system { fill: var(--hue3); } .rm .role.user { fill: var(--hue0); }
.rm .role.assistant { fill: var(--hue2); } .rm .role.tool { fill: var(--hue4); }
.rm .written { font-size: 10.5px; font-weight: 600; fill: var(--ink); }
.rm .stripe, .rm .bar-new { fill: var(--hue); }
.rm .bar-cached { fill: var(--hue); opacity: .28; }
.rm .bar-written { fill: var(--ink); opacity: .8; }
.rm .track { fill: var(--track); }
.rm .prefix { fill: none; stroke: var(--hue); stroke-linecap: round; opacity: .62; }
.rm .join { fill: none; stroke: var(--hue); stroke-width: 1.6; stroke-dasharray: 1 5; stroke-linecap: round; }
.rm .use { fill: none; stroke: var(--soft); stroke-width: 1.3; stroke-dasharray: 5 4; opacity: .75; }
.rm .badge rect { fill: var(--hue); }
.rm .badge text { font-size: 10px; font-weight: 650; fill: var(--card); }
.rm .heading { font-size: 22px; font-weight: 700; letter-spacing: -.01em; fill: var(--ink); }
.rm .summary { font-size: 12.5px; fill: var(--soft); }
.rm .bad { fill: #e5484d; font-weight: 600; }
"""


_ROLES = re.compile(r"(^|⏎ )(system|user|assistant|tool):")  # where a message begins in a card's text


def variables(colours: dict[str, str], hues: tuple[str, ...]) -> str:
    """Return the style-sheet variables of one theme."""
    found = [f"--{name}: {value};" for name, value in colours.items()]
    found += [f"--hue{index}: {value};" for index, value in enumerate(hues)]
    return " ".join(found)


def styles() -> str:
    """Return the style sheet of a drawing that follows the reader's preference of light or dark."""
    hues = "\n".join(f".rm .h{i} {{ --hue: var(--hue{i}); }}" for i in range(len(LIGHT_HUES)))
    return (
        f".rm {{ {variables(LIGHT, LIGHT_HUES)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ .rm {{ {variables(DARK, DARK_HUES)} }} }}\n{RULES}{hues}\n"
    )


def to_svg(program: str, summary: str, cards: Sequence[Card], *, is_embedded: bool = False) -> str:
    """Return the SVG. `summary`: one line about the whole program. `is_embedded`: the page around it has the styles."""
    num_columns = 1 + max((card.column for card in cards), default=0)
    num_lanes = 1 + max((card.lane for card in cards), default=0)
    width = max(LEFT * 2 + num_columns * (WIDTH + GAP_X) - GAP_X, LEFT * 2 + LEGEND)
    timed = sorted((card for card in cards if card.start_s is not None and card.end_s), key=lambda c: c.start_s or 0.0)
    bottom = TOP + num_lanes * (HEIGHT + GAP_Y) - GAP_Y
    height = bottom + BOTTOM + (TIME_ROW * (len(timed) + 2) if timed else 0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="rm" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="graph of {escape(program, quote=True)}">'
    ]
    if not is_embedded:
        parts.append(f"<style>{styles()}</style>")
    parts.append('<rect width="100%" height="100%" style="fill: var(--bg)"/>')
    parts.append(f'<text class="heading" x="{LEFT}" y="44">{escape(program)}</text>')
    files = Counter(card.line.rpartition(":")[0] for card in cards)
    file = files.most_common(1)[0][0] if files else ""
    heading = " · ".join(part for part in (file.rpartition("/")[2], summary) if part)
    parts.append(f'<text class="summary" x="{LEFT}" y="66">{escape(heading)}</text>')
    for card in cards:
        parts.extend(_edges(card, cards))
    parts.extend(_card(card, file) for card in cards)
    if timed:
        parts.append(_timeline(timed, bottom + 2 * TIME_ROW, width - 2 * LEFT))
    parts.append(_legend(height))
    parts.append("</svg>")
    return "\n".join(parts)


def _timeline(cards: Sequence[Card], top: float, width: float) -> str:
    """Draw when each card was asked for, wrote its first token, and was done: one row a card, time to the right."""
    end_s = max(card.end_s or 0.0 for card in cards)
    scale = (width - TIME_LABEL) / end_s
    parts = [f'<g class="times" transform="translate({LEFT} {top:.0f})">']
    for row, card in enumerate(cards):
        y, start_s, done_s = TIME_ROW * row, card.start_s or 0.0, card.end_s or 0.0
        first_s = start_s if card.first_token_s is None else card.first_token_s
        parts.append(f'<text class="label" y="{y + 8}">{escape(_short(f"{card.kind} {card.name}", 22))}</text>')
        for kind, begin, end in (("bar-cached", start_s, first_s), ("bar-new", first_s, done_s)):
            x, size = TIME_LABEL + begin * scale, max(1.0, (end - begin) * scale)
            if end > begin:
                parts.append(
                    f'<rect class="{kind} h{card.hue}" x="{x:.1f}" y="{y}" width="{size:.1f}" height="8" rx="2"/>'
                )
    y = TIME_ROW * len(cards) + 8
    parts.append(f'<text class="time" x="{TIME_LABEL}" y="{y}">0, pale until the first token</text>')
    parts.append(f'<text class="time" x="{width:.0f}" y="{y}" text-anchor="end">{_duration(end_s)}</text></g>')
    return "".join(parts)


def _position(card: Card) -> tuple[float, float]:
    return LEFT + card.column * (WIDTH + GAP_X), TOP + card.lane * (HEIGHT + GAP_Y)


def _edges(card: Card, cards: Sequence[Card]) -> list[str]:
    x, y = _position(card)
    found = []
    if card.parent is not None:
        before = cards[card.parent]
        size = (card.cached or 0) if card.kind in ("gen", "select") else 0
        thick = 2 + min(4.0, math.log2(1 + size / 32)) if size else 2.5
        px, py = _position(before)
        curve = _curve(px + WIDTH, py + HEIGHT / 2, x, y + HEIGHT / 2)
        found.append(f'<path class="prefix h{card.hue}" stroke-width="{thick:.1f}" d="{curve}"/>')
    for kind, sources in (("join", card.joins), ("use", card.uses)):
        for source in sources:
            other = cards[source]
            px, py = _position(other)
            curve = _curve(px + WIDTH, py + HEIGHT / 2, x, y + HEIGHT / 2 + (10 if kind == "use" else 4))
            found.append(f'<path class="{kind} h{other.hue}" d="{curve}"/>')
    return found


def _curve(x0: float, y0: float, x1: float, y1: float) -> str:
    """Draw a curve, level at both ends. It turns in the gap before the target, so that it doesn't run behind cards."""
    if abs(y0 - y1) < 1:
        return f"M{x0:.0f} {y0:.0f}H{x1:.0f}"
    bend = GAP_X * 0.9
    if x1 - x0 <= 1.5 * GAP_X:
        return f"M{x0:.0f} {y0:.0f}C{x0 + bend:.0f} {y0:.0f} {x1 - bend:.0f} {y1:.0f} {x1:.0f} {y1:.0f}"
    if y1 > y0:  # down into its lane first, then along it
        turn = x0 + GAP_X
        return f"M{x0:.0f} {y0:.0f}C{x0 + bend:.0f} {y0:.0f} {turn - bend:.0f} {y1:.0f} {turn:.0f} {y1:.0f}H{x1:.0f}"
    turn = x1 - GAP_X  # along its lane, then up
    return f"M{x0:.0f} {y0:.0f}H{turn:.0f}C{turn + bend:.0f} {y0:.0f} {x1 - bend:.0f} {y1:.0f} {x1:.0f} {y1:.0f}"


def _card(card: Card, file: str) -> str:
    x, y = _position(card)
    if card.num_hidden:
        return (
            f'<g class="card h{card.hue}" data-card="{card.id}" transform="translate({x:.0f} {y:.0f})">'
            f'<rect class="box" width="{WIDTH}" height="{HEIGHT}" rx="10" stroke-dasharray="4 4"/>'
            f'<text class="title" x="{WIDTH / 2}" y="{HEIGHT / 2 + 4}" text-anchor="middle">'
            f"{escape(card.name)}</text></g>"
        )
    parts = [
        f'<g class="card h{card.hue}" data-card="{card.id}" transform="translate({x:.0f} {y:.0f})" tabindex="0">',
        f"<title>{escape(' '.join((card.kind, card.name, card.line)))}</title>",
        f'<rect class="box" width="{WIDTH}" height="{HEIGHT}" rx="10"/>',
        f'<rect class="stripe" x="0" y="12" width="3.5" height="{HEIGHT - 24}" rx="1.75"/>',
        f'<text class="kind" x="16" y="21">{escape(card.kind.upper())}</text>',
    ]
    title_x = 16 + 7.6 * len(card.kind) + 7
    if card.name:
        parts.append(f'<text class="title" x="{title_x:.0f}" y="21.5">{escape(_short(card.name, 18))}</text>')
    path, _, number = card.line.rpartition(":")
    where = f"line {number}" if path == file else card.line.rpartition("/")[2]
    parts.append(f'<text class="line" x="{WIDTH - 12}" y="21" text-anchor="end">{escape(_short(where, 26))}</text>')
    has_output = card.kind in ("gen", "select", "tool")
    lines = _tail_lines(card.prompt, 2 if has_output else 4)
    for index, text in enumerate(lines):
        parts.append(_mono("prompt", 41 + 14 * index, text))
    if card.error:
        parts.append(_mono("prompt" if card.is_cancelled else "bad", 73, card.error))
    elif card.written_text:
        for index, text in enumerate(_head_lines(card.written_text, 2)):
            parts.append(_mono("written", 41 + 14 * len(lines) + 2 + 14 * index, text))
        if card.probs:
            parts.append(_mono("prompt", 41 + 14 * len(lines) + 2 + 14, _head_lines(card.probs, 1)[0]))
    elif card.kind == "gen" and card.end_s is not None:  # it ran and ended immediately
        parts.append(_mono("prompt", 41 + 14 * len(lines) + 2, "(no text)"))
    parts.append(_bar(card))
    parts.append("</g>")
    return "".join(parts)


def _bar(card: Card) -> str:
    """Draw a card's cached, computed and written tokens as a bar, scaled to this card."""
    y = HEIGHT - 24
    if card.cached is None or card.computed is None:
        if not card.prefix_tokens and card.num_readers < 2:
            return ""
        size = f"{card.prefix_tokens} tokens, " if card.prefix_tokens else ""
        text = f"{size}read by {card.num_readers} requests"
        badge = 5.75 * len(text) + 18
        return (
            f'<g class="badge" transform="translate(14 {y - 4})"><rect width="{badge:.0f}" height="18" rx="9"/>'
            f'<text x="9" y="12.5">{escape(text)}</text></g>'
        )
    parts = [f'<rect class="track" x="16" y="{y}" width="{WIDTH - 30}" height="4" rx="2"/>']
    sizes = (("cached", card.cached), ("new", card.computed), ("written", card.written or 0))
    total = sum(count for _, count in sizes) or 1
    x = 16.0
    for style, count in sizes:
        width = (WIDTH - 30) * count / total
        if count:
            parts.append(
                f'<rect class="bar-{style}" x="{x:.1f}" y="{y}" width="{max(width, 1.5):.1f}" height="4" rx="1"/>'
            )
        x += width
    parts.append(f'<text class="label" x="16" y="{y + 17}">{escape(_short(card.label, 44))}</text>')
    if card.end_s is not None and card.start_s is not None:
        took = _duration(card.end_s - card.start_s)
        parts.append(f'<text class="time" x="{WIDTH - 13}" y="{y + 17}" text-anchor="end">{took}</text>')
    return "".join(parts)


def _duration(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def _legend(height: float) -> str:
    y = height - 20
    items = []
    x = float(LEFT)
    for style, text in (
        ("bar-cached", "cached"),
        ("bar-new", "computed"),
        ("bar-written", "written"),
    ):
        items.append(f'<rect class="{style}" x="{x:.0f}" y="{y - 6}" width="18" height="5" rx="2.5"/>')
        items.append(f'<text class="label" x="{x + 24:.0f}" y="{y}">{text}</text>')
        x += 44 + 6.2 * len(text)
    for style, text in (("prefix", "text continues"), ("join", "joined"), ("use", "value used")):
        items.append(f'<path class="{style}" stroke-width="2.5" d="M{x:.0f} {y - 3.5}h24"/>')
        items.append(f'<text class="label" x="{x + 30:.0f}" y="{y}">{text}</text>')
        x += 50 + 6.2 * len(text)
    items.append(f'<text class="label" x="{x:.0f}" y="{y}">branches of one colour read one prefix</text>')
    return f'<g class="h0">{"".join(items)}</g>'


def _mono(style: str, y: float, text: str) -> str:
    shown = escape(_short(text, CHARS))
    if style == "prompt":
        shown = _ROLES.sub(r'\1<tspan class="role \2">\2:</tspan>', shown)
    return f'<text class="mono {style}" x="16" y="{y:.1f}" xml:space="preserve">{shown}</text>'


def _pieces(text: str) -> list[str]:
    """Return the lines of a card. Line breaks of the text become signs; lines are cut at spaces if possible."""
    words = " ".join(text.replace("\n", " ⏎ ").split())
    lines: list[str] = []
    while cell_len(words) > CHARS:
        most = _num_fitting(words, CHARS)
        cut = words.rfind(" ", most // 2, most + 1)
        cut = most if cut < 0 else cut
        lines.append(words[:cut])
        words = words[cut:].lstrip()
    return [*lines, words] if words else lines


def _head_lines(text: str, limit: int) -> list[str]:
    lines = _pieces(text)
    if len(lines) <= limit:
        return lines
    last = lines[limit - 1]
    return [*lines[: limit - 1], last[: _num_fitting(last, CHARS - 2)] + " …"]


def _tail_lines(text: str, limit: int) -> list[str]:
    """Return the last lines of a prompt, because its end says more than its beginning."""
    lines = _pieces(text)
    return lines if len(lines) <= limit else [_short("… " + lines[-limit], CHARS), *lines[len(lines) - limit + 1 :]]


def _short(text: str, limit: int) -> str:
    return text if cell_len(text) <= limit else text[: _num_fitting(text, limit - 1)] + "…"


def _num_fitting(text: str, cells: int) -> int:
    """Return how many characters fit into this number of cells. Chinese characters and emoji take two cells."""
    count = 0
    for char in text:
        cells -= cell_len(char)
        if cells < 0:
            break
        count += 1
    return count
