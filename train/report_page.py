"""The report as one HTML file that needs nothing beside itself: no script, no font, no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

STYLE = """
:root { --ink:#1f2430; --soft:#667085; --line:#e3e7ee; --card:#fff; --ground:#f5f7fa;
  --good:#2563c9; --ceiling:#12805c; --floor:#b45309; }
* { box-sizing:border-box } body { margin:0; background:var(--ground); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif }
main { max-width:1180px; margin:0 auto; padding:32px 20px 80px }
h1 { font-size:26px; margin:0 } h2 { font-size:18px; margin:40px 0 12px } h3 { font-size:14px;
  margin:24px 0 8px; color:var(--soft); font-weight:600 }
p.lead { color:var(--soft); margin:4px 0 0 }
.facts { display:flex; flex-wrap:wrap; gap:10px; margin:20px 0 0 }
.fact { background:var(--card); border:1px solid var(--line); border-radius:10px;
  padding:10px 14px }
.fact b { display:block; font-size:20px } .fact span { color:var(--soft); font-size:12px }
.scroll { overflow-x:auto }
table { border-collapse:collapse; width:100%; background:var(--card); border:1px solid var(--line);
  border-radius:10px; font-variant-numeric:tabular-nums }
th,td { padding:7px 12px; text-align:right; border-bottom:1px solid var(--line);
  white-space:nowrap }
th { font-size:12px; color:var(--soft); font-weight:600 }
th:nth-child(-n+2),td:nth-child(-n+2) { text-align:left } td.bar { width:240px }
.clips { display:grid; grid-template-columns:repeat(auto-fill,minmax(var(--cell),1fr)); gap:14px }
.clip { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:12px }
.clip p { margin:0 0 8px; font-size:14px; min-height:2.9em }
figure { margin:0 } video,figure img { width:100%; display:block; image-rendering:pixelated }
figcaption { display:flex; font-size:11px; color:var(--soft); margin-top:3px }
figcaption span { flex:1 } p.note { color:var(--soft); font-size:12px; margin:8px 0 0 }
.chips { display:flex; flex-wrap:wrap; gap:5px; margin-top:8px }
.chip { font-size:11px; border-radius:20px; padding:1px 8px; background:#eef2f7; color:var(--soft) }
.chip.good { background:#e3f3ec; color:var(--ceiling) } .chip.bad { background:#fdefe2;
  color:var(--floor) }
.curves { display:grid; grid-template-columns:repeat(auto-fill,minmax(330px,1fr)); gap:12px }
.curves div { background:var(--card); border:1px solid var(--line); border-radius:10px;
  padding:8px }
.curves svg { width:100%; height:auto; display:block }
pre { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px;
  overflow-x:auto; font-size:12px; line-height:1.4 }
summary { cursor:pointer; color:var(--soft); margin:12px 0 }
"""


@dataclass(frozen=True)
class View:
    """One moving or still picture: `data` is an mp4 (H.264, 4:2:0) or PNG."""

    data: bytes
    mime: str = "video/mp4"


@dataclass(frozen=True)
class ClipCard:
    """A prompt with its picture, the labels of what is side by side in it, and scores in [0, 1]."""

    prompt: str
    view: View
    labels: Sequence[str] = ()
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreRow:
    """One line of the score table; every number in [0, 1]."""

    family: str
    name: str
    num_clips: int
    score: float
    low: float  # Wilson 95 %
    high: float
    chance: float
    blind: float  # right in all but this score
    ceiling: float | None  # None where no true clip is known
    truth: float | None
    normalised: float | None  # (score − chance) / (ceiling − chance), None without room between


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Large numbers on top of the page: (value, what it is)."""
    inner = "".join(
        f'<div class="fact"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for value, name in pairs
    )
    return f'<div class="facts">{inner}</div>'


def note(text: str) -> str:
    """A paragraph of small print."""
    return f'<p class="note">{escape(text)}</p>'


def picture(card: ClipCard) -> str:
    """The card's video or image, the bytes inside the page, with its labels below."""
    source = f"data:{card.view.mime};base64,{base64.b64encode(card.view.data).decode()}"
    if card.view.mime.startswith("video/"):
        element = f'<video src="{source}" autoplay loop muted playsinline></video>'
    else:
        element = f'<img src="{source}" alt="{escape(card.prompt)}">'
    labels = "".join(f"<span>{escape(label)}</span>" for label in card.labels)
    return f"<figure>{element}<figcaption>{labels}</figcaption></figure>"


def clip_grid(cards: Sequence[ClipCard]) -> str:
    """Prompts side by side, each with its picture and score chips."""
    widest = max((len(card.labels) for card in cards), default=1)
    blocks = []
    for card in cards:
        chips = "".join(
            f'<span class="chip {"good" if value >= 0.5 else "bad"}">'
            f"{escape(name)} {value:.2f}</span>"
            for name, value in card.scores.items()
        )
        blocks.append(
            f'<div class="clip"><p>{escape(card.prompt)}</p>{picture(card)}'
            f'<div class="chips">{chips}</div></div>'
        )
    width = 70 + 120 * max(widest, 1)
    return f'<div class="clips" style="--cell:{width}px">{"".join(blocks)}</div>'


def score_bar(row: ScoreRow) -> str:
    """Score with its interval on a line from 0 to 1; ticks for blind and ceiling."""

    def x(value: float) -> str:
        return f"{4 + 212 * value:.1f}"

    def tick(value: float, colour: str, name: str) -> str:
        return (
            f'<line x1="{x(value)}" x2="{x(value)}" y1="2" y2="18" stroke="var(--{colour})" '
            f'stroke-width="2"><title>{name} {value:.2f}</title></line>'
        )

    return (
        '<svg width="220" height="20" role="img" '
        f'aria-label="{row.score:.2f}, interval {row.low:.2f} to {row.high:.2f}">'
        '<line x1="4" x2="216" y1="10" y2="10" stroke="var(--line)" stroke-width="6" '
        'stroke-linecap="round"/>'
        f'<line x1="{x(row.low)}" x2="{x(row.high)}" y1="10" y2="10" stroke="var(--good)" '
        'stroke-opacity=".35" stroke-width="6" stroke-linecap="round"/>'
        f"{tick(row.blind, 'floor', 'blind')}"
        f"{'' if row.ceiling is None else tick(row.ceiling, 'ceiling', 'ceiling')}"
        f'<circle cx="{x(row.score)}" cy="10" r="5" fill="var(--good)"/></svg>'
    )


def score_table(rows: Sequence[ScoreRow]) -> str:
    """Score, interval, chance, ceiling, truth; one line per family and score."""
    head = "".join(
        f"<th>{name}</th>"
        for name in (
            *("family", "score", "clips", "drawn", "95 %", "chance", "blind", "VAE ceiling"),
            *("truth", "normalised", "0 … 1"),
        )
    )
    lines = []
    for row in rows:
        last = ("–" if v is None else f"{v:.2f}" for v in (row.ceiling, row.truth, row.normalised))
        cells = (
            *(escape(row.family), escape(row.name), str(row.num_clips), f"<b>{row.score:.2f}</b>"),
            *(f"{row.low:.2f}–{row.high:.2f}", f"{row.chance:.2f}"),
            *(f"{row.blind:.2f}", *last),
        )
        inner = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr>{inner}<td class="bar">{score_bar(row)}</td></tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def curve_grid(curves: Sequence[str]) -> str:
    """SVG elements side by side."""
    return f'<div class="curves">{"".join(f"<div>{curve}</div>" for curve in curves)}</div>'


def hidden(title: str, html: str) -> str:
    """Something behind a click."""
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


def folded(title: str, text: str) -> str:
    """Long plain text behind a click."""
    return hidden(title, f"<pre>{escape(text)}</pre>")


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole document; `sections` are (heading, HTML), a heading may be empty."""
    body = "".join(
        (f"<section><h2>{escape(heading)}</h2>" if heading else "<section>") + f"{html}</section>"
        for heading, html in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{body}</main></body></html>\n'
    )
