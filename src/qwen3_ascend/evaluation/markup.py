"""HTML and SVG as trees: whatever text they hold, it is escaped when they are written."""

from __future__ import annotations

from xml.etree.ElementTree import Element, tostring

Node = Element | str


def element(tag: str, *children: Node | None, **attributes: object) -> Element:
    """An element; `class_` stands for class, and `text_anchor` for text-anchor."""
    names = {key.rstrip("_").replace("_", "-"): f"{value}" for key, value in attributes.items()}
    made = Element(tag, names)
    for child in children:
        _append(made, child)
    return made


def _append(made: Element, child: Node | None) -> None:
    if child is None:
        return
    if isinstance(child, Element):
        made.append(child)
    elif len(made):
        made[-1].tail = (made[-1].tail or "") + child
    else:
        made.text = (made.text or "") + child


def table(header: tuple[str, ...], rows: list[tuple[Node, ...]], numbers: int = 0) -> Element:
    """A table whose last `numbers` columns are aligned to the right."""
    left = len(header) - numbers

    def cells(kind: str, values: tuple[Node, ...]) -> list[Element]:
        return [
            element(kind, value, **({"class_": "number"} if column >= left else {}))
            for column, value in enumerate(values)
        ]

    body = [element("tr", *cells("td", row)) for row in rows]
    head = element("thead", element("tr", *cells("th", header))) if any(header) else None
    return element("div", element("table", head, element("tbody", *body)), class_="wide")


def document(title: str, style: str, *children: Node | None) -> str:
    """A whole page."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", style),
    )
    page = element("html", head, element("body", element("main", *children)), lang="en")
    return f"<!doctype html>\n{tostring(page, encoding='unicode', method='html')}\n"
