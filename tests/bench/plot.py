"""The ways to a usable machine as one picture: bars on a logarithmic axis of time. It is `docs/performance.svg`.

Only what was measured is drawn, each bar from a median of the results. The picture has no background of its own and is
readable on a light page and on a dark one; a screen reader gets every figure from its description.
"""

import math
from xml.sax.saxutils import escape

import forks
import libvirt
import measures
import others

# Of each bar: what it says, which result and which side of it, and whose way it is.
BARS = (
    ("nido: claim from the pool", "pool", forks.CLAIMED, "nido"),
    ("by hand: a waiting clone resumes", "pool", forks.BARE_CLAIM, "other"),
    ("nido: fork", "fork", forks.FORK, "nido"),
    ("by hand: fork", "fork", forks.BARE, "other"),
    ("nido: fork, slim kernel", "fork", forks.SLIM_FORK, "nido"),
    ("nido: cold start", "spawn", forks.COLD, "nido"),
    ("by hand: cold start", "spawn", measures.BARE, "other"),
    ("nido: cold start, slim kernel", "fork", forks.SLIM_COLD, "nido"),
    ("nido: cold start, machine pc", "libvirt", libvirt.NIDO, "nido"),
    ("libvirt: cold start, machine pc", "libvirt", libvirt.VIRSH, "other"),
    ("full Debian with systemd and ssh", "others", others.DEBIAN, "other"),
)
WIDTH, LEFT, RIGHT, TOP, ROW, BAR = 860, 260, 90, 46, 30, 18
# All of middle lightness, apart from white and from black: a picture inside a page is not told which of the two the page
# is. Blue and orange are apart from each other for every eye.
STYLE = """
    text { font: 14px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #767c83; }
    .title { font-weight: 600; }
    .tick { font-size: 12px; }
    .grid { stroke: #8c959f; stroke-opacity: 0.35; }
    .nido { fill: #2f81f7; }
    .other { fill: #d18616; }
"""


def medians(results):
    """What can be drawn: label, milliseconds and whose way it is."""
    named = {result.name: result for result in results}
    for label, name, side, whose in BARS:
        if name in named and named[name].samples.get(side):
            yield label, named[name].median(side), whose


def spoken(milliseconds):
    """A time as one would say it, to three figures."""
    rounded = float(f"{milliseconds:.3g}")
    return f"{rounded / 1000:g} s" if rounded >= 1000 else f"{rounded:g} ms"


def decades(values):
    """The powers of ten below and above all values."""
    return math.floor(math.log10(min(values))), math.ceil(math.log10(max(values) * 1.001))


def svg(results):
    """The picture; nothing if none of it was measured."""
    bars = list(medians(results))
    if not bars:
        return None
    first, last = decades([value for _, value, _ in bars])
    at = lambda value: LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(value) - first) / (last - first)
    bottom = TOP + ROW * len(bars)
    title = "Until a machine can be used"
    told = "Median times, shorter is better. " + "; ".join(f"{label}: {spoken(value)}" for label, value, _ in bars) + "."
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 30}" width="{WIDTH}" height="{bottom + 30}"'
        ' role="img" aria-labelledby="title desc">',
        f'  <title id="title">{escape(title)}</title>',
        f'  <desc id="desc">{escape(told)}</desc>',
        f"  <style>{STYLE}  </style>",
        f'  <text class="title" x="8" y="22">{escape(title)}</text>',
        f'  <text class="tick" x="{WIDTH - 8}" y="22" text-anchor="end">median, logarithmic scale; shorter is better</text>',
    ]
    for power in range(first, last + 1):
        x = at(10**power)
        lines.append(f'  <line class="grid" x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{bottom}"/>')
        tick = f"{10**power / 1000:g} s" if power >= 3 else f"{10**power:g} ms"
        lines.append(f'  <text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick}</text>')
    for number, (label, value, whose) in enumerate(bars):
        y = TOP + ROW * number + (ROW - BAR) / 2
        end, text = at(value), y + BAR - 4
        lines += [
            f'  <text x="{LEFT - 10}" y="{text:.1f}" text-anchor="end">{escape(label)}</text>',
            f'  <rect class="{whose}" x="{LEFT}" y="{y:.1f}" width="{max(1, end - LEFT):.1f}" height="{BAR}" rx="2"/>',
            f'  <text x="{end + 6:.1f}" y="{text:.1f}">{spoken(value)}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"
