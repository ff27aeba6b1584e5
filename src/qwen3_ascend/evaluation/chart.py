"""Plots as inline SVG, without scripts: colours come from the page, values from tooltips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from qwen3_ascend.evaluation.markup import element

WIDTH, HEIGHT = 860, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 40
"""Room around the plot, in units of the view box."""

MARK = 4
"""Half the size of a point's mark."""


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one kind, each with its tooltip."""

    name: str
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Scale:
    """Values of an axis to places on the page."""

    least: float
    most: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.least) / ((self.most - self.least) or 1)
        return round(self.start + share * (self.end - self.start), 1)


def ticks(least: float, most: float, about: int = 5) -> list[float]:
    """Round numbers that enclose a range: multiples of 1, 2 or 5 times a power of ten."""
    rough = max((most - least) / about, 1e-12)
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(least / step), math.ceil(most / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def lines(series: Sequence[Series], x_name: str, y_name: str) -> Element:
    """A line for each series over whole numbers, each with a colour and a mark of its own."""
    xs = [x for one in series for x, _, _ in one.points]
    ys = [y for one in series for _, y, _ in one.points]
    marks = ticks(min(ys), max(ys))
    x = Scale(min(xs), max(xs), LEFT + 10, WIDTH - RIGHT - 10)
    y = Scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP)
    plot = element(
        "svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{y_name}, by {x_name}"
    )
    _grid(plot, y, marks)
    for tick in sorted({round(tick) for tick in ticks(min(xs), max(xs), 12)}):
        if min(xs) <= tick <= max(xs):
            plot.append(_text(x(tick), HEIGHT - BOTTOM + 18, f"{tick}", "middle"))
    plot.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_name, "middle"))
    for number, one in enumerate(series):
        group = element("g", class_=f"series s{number}")
        path = " ".join(f"{x(at)},{y(value)}" for at, value, _ in one.points)
        group.append(element("polyline", points=path))
        for at, value, said in one.points:
            group.append(_mark(number, x(at), y(value), f"{one.name}, {said}"))
        plot.append(group)
    legend = _legend([one.name for one in series])
    return element("figure", _caption(f"{y_name}, by {x_name}"), legend, plot)


def whisker(value: float, low: float, high: float, reach: float) -> Element:
    """An interval beside zero, on a scale from -reach to reach."""
    width, height = 220, 18
    x = Scale(-reach, reach, 6, width - 6)
    middle = height / 2
    return element(
        "svg",
        element("line", x1=x(0), x2=x(0), y1=1, y2=height - 1, class_="zero"),
        element("g",
            element("line", x1=x(low), x2=x(high), y1=middle, y2=middle),
            element("circle", cx=x(value), cy=middle, r=MARK),
            class_="series s0"),
        viewBox=f"0 0 {width} {height}", width=width, height=height, role="img", class_="whisker",
        aria_label="interval beside zero",
    )  # fmt: skip


def _grid(plot: Element, y: Scale, marks: Sequence[float]) -> None:
    for tick in marks:
        line = element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(tick), y2=y(tick), class_="grid")
        plot.append(line)
        plot.append(_text(LEFT - 8, y(tick) + 4, f"{tick:g}", "end"))


def _text(x: float, y: float, said: str, anchor: str) -> Element:
    return element("text", said, x=x, y=y, text_anchor=anchor)


def _mark(number: int, x: float, y: float, said: str) -> Element:
    """Marks differ in shape as well as in colour: circle, square, triangle, diamond, in turn."""
    title, size = element("title", said), MARK
    if number % 4 == 0:
        return element("circle", title, cx=x, cy=y, r=size)
    if number % 4 == 1:
        return element("rect", title, x=x - size, y=y - size, width=2 * size, height=2 * size)
    corners = [(0, -size - 1), (size + 1, size), (-size - 1, size)]
    if number % 4 == 3:
        corners = [(0, -size - 2), (size + 2, 0), (0, size + 2), (-size - 2, 0)]
    points = " ".join(f"{round(x + dx, 1)},{round(y + dy, 1)}" for dx, dy in corners)
    return element("polygon", title, points=points)


def _legend(names: Sequence[str]) -> Element:
    entries = []
    for number, name in enumerate(names):
        key = element(
            "svg", element("g", _mark(number, 8, 8, name), class_=f"series s{number}"),
            viewBox="0 0 16 16", width=16, height=16, aria_hidden="true",
        )  # fmt: skip
        entries.append(element("span", key, name))
    return element("div", *entries, class_="legend")


def _caption(said: str) -> Element:
    return element("figcaption", said)
