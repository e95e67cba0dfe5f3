"""The pictures of the lessons, drawn as SVG: rows of labelled boxes, and lines between them."""

from html import escape

WIDTH, HEIGHT, GAP, LINE = 52, 30, 6, 58
COLOURS = ("#cfe3ff", "#ffd9c2", "#cdeccd", "#ecd6f5", "#eeeeee", "#ffffff")
Box = tuple[str, int]  # a label, and the number of a colour

# For each picture a title, rows of a name and boxes, and pairs of boxes that a line joins: (row, box) to (row, box).
PICTURES: dict[str, tuple[str, list[tuple[str, list[Box]]], list[tuple[int, int, int, int]]]] = {
    "grouping": (
        "Slots go to the rows of their experts",
        [
            ("slots", [(f"t{slot // 2} e{e}", e) for slot, e in enumerate((2, 0, 0, 1, 2, 1))]),
            ("by expert", [(f"t{t} e{e}", e) for t, e in ((0, 0), (1, 0), (1, 1), (2, 1), (0, 2), (2, 2))]),
        ],
        [(0, 0, 1, 4), (0, 1, 1, 0), (0, 2, 1, 1), (0, 3, 1, 2), (0, 4, 1, 5), (0, 5, 1, 3)],
    ),
    "blocks": (
        "Each expert's slots are padded to whole blocks of a GEMM",
        [
            ("slots", [("1", 0), ("2", 0), ("3", 1), ("6", 4), ("0", 2), ("4", 2)]),
            ("block of", [("e0", 0), ("", 5), ("e1", 1), ("", 5), ("e2", 2), ("", 5)]),
        ],
        [],
    ),
    "threads": (
        "Three blocks of four threads serve ten elements",
        [
            ("threads", [(f"b{t // 4} t{t % 4}", t // 4) for t in range(12)]),
            ("elements", [(str(i), i // 4) for i in range(10)]),
        ],
        [(0, i, 1, i) for i in range(10)],
    ),
    "simulator": (
        "One thread runs at a time, and hands over where it waits or has loaded",
        [
            ("thread 0", [("load", 0), ("", 5), ("", 5), ("store", 0)]),
            ("thread 1", [("", 5), ("load", 1), ("store", 1)]),
        ],
        [(0, 0, 1, 1), (1, 2, 0, 3)],
    ),
    "lost": (
        "Both threads load 4, and both store 5: one is lost",
        [
            ("thread 0", [("load 4", 0), ("", 5), ("", 5), ("store 5", 0)]),
            ("thread 1", [("", 5), ("load 4", 1), ("store 5", 1)]),
        ],
        [(0, 0, 1, 1), (1, 2, 0, 3)],
    ),
    "places": (
        "A slot's place: its expert's offset, plus its rank",
        [
            ("experts", [(f"e{e}", e) for e in (2, 0, 0, 1, 2, 1)]),
            ("offset", [(str(o), e) for o, e in ((4, 2), (0, 0), (0, 0), (2, 1), (4, 2), (2, 1))]),
            ("rank", [(str(r), e) for r, e in ((0, 2), (0, 0), (1, 0), (0, 1), (1, 2), (1, 1))]),
        ],
        [],
    ),
    "shuffle": (
        "After distances 4, 2, 1 every one of eight lanes has the largest",
        [
            ("values", [(str(v), 4) for v in (3, 8, 1, 6, 2, 7, 5, 4)]),
            ("distance 4", [(str(v), 0) for v in (3, 8, 5, 6, 3, 8, 5, 6)]),
            ("distance 2", [(str(v), 1) for v in (5, 8, 5, 8, 5, 8, 5, 8)]),
            ("distance 1", [("8", 2)] * 8),
        ],
        [(0, 0, 1, 4), (0, 4, 1, 0), (1, 0, 2, 2), (1, 2, 2, 0), (2, 0, 3, 1), (2, 1, 3, 0)],
    ),
    "picks": (
        "The next pick comes after the last: lower, or equal and further right",
        [
            ("logits", [("1", 4), ("5", 0), ("5", 1), ("2", 4)]),
            ("pick", [("", 5), ("first", 0), ("second", 1), ("", 5)]),
        ],
        [(0, 1, 1, 1), (0, 2, 1, 2)],
    ),
    "roofline": (
        "Neighbouring threads read neighbours: one line for all of them",
        [("lanes", [(str(lane), 0) for lane in range(8)]), ("one line", [(str(i), 0) for i in range(8)])],
        [(0, i, 1, i) for i in range(8)],
    ),
    "queue": (
        "The host launches while the device works: the longer of the two counts",
        [("host", [(f"launch {i}", 0) for i in range(6)]), ("device", [("", 5), *((f"run {i}", 1) for i in range(5))])],
        [(0, i, 1, i + 1) for i in range(5)],
    ),
    "planted": (
        "A fault that no case catches asks for a case",
        [("faults", [("expert", 0), ("-1", 1), ("barrier", 2)]), ("cases", [("one", 4), ("-1 rows", 1), ("tiles", 2)])],
        [(0, 1, 1, 1), (0, 2, 1, 2)],
    ),
    "ranks": (
        "Each rank knows its own experts, and -1 for all others",
        [
            ("expert", [(f"e{e}", e // 2) for e in range(4)]),
            ("rank 0", [("0", 0), ("1", 0), ("-1", 4), ("-1", 4)]),
            ("rank 1", [("-1", 4), ("-1", 4), ("0", 1), ("1", 1)]),
        ],
        [],
    ),
}


def draw(name: str) -> str:
    """Return a picture as SVG that scales with the page."""
    title, rows, lines = PICTURES[name]
    left = 84

    def at(row: int, box: int) -> tuple[int, int]:
        return left + box * (WIDTH + GAP), 34 + row * LINE

    width = left + max(len(boxes) for _, boxes in rows) * (WIDTH + GAP)
    parts = [f'<text x="4" y="18" font-weight="bold">{escape(title)}</text>']
    for row, box, other_row, other in lines:
        (x, y), (x2, y2) = at(row, box), at(other_row, other)
        begin, end = (y + HEIGHT, y2) if y < y2 else (y, y2 + HEIGHT)
        parts.append(f'<path d="M{x + WIDTH // 2} {begin} L{x2 + WIDTH // 2} {end}" stroke="#777" fill="none"/>')
    for row, (label, boxes) in enumerate(rows):
        parts.append(f'<text x="4" y="{at(row, 0)[1] + 20}">{escape(label)}</text>')
        for box, (text, colour) in enumerate(boxes):
            x, y = at(row, box)
            if text or colour != 5:
                shape = f'x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4"'
                parts.append(f'<rect {shape} fill="{COLOURS[colour]}" stroke="#777"/>')
                parts.append(f'<text x="{x + WIDTH // 2}" y="{y + 20}" text-anchor="middle">{escape(text)}</text>')
    width, height = max(width, 8 * len(title)), 34 + len(rows) * LINE
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" style="max-width:100%"'
    head += f' width="{width}" font-family="sans-serif" font-size="13"><title>{escape(title)}</title>'
    return f"{head}{''.join(parts)}</svg>"


def show(name: str) -> None:
    """Show a picture in a notebook; elsewhere say what it shows."""
    try:
        from IPython.display import SVG, display
    except ImportError:
        print(f"[picture: {PICTURES[name][0]}]")
    else:
        display(SVG(draw(name)))
