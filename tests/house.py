"The house on one screen (`make house`): every notebook with its cells, exported lines and job; every module with what it imports."
import ast
import re
import sys
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).parent))
from test_imports import pages, ROOT, targets  # noqa: E402


def page_row(path):
    "Name, cells, exported lines and subtitle of a notebook."
    cells = nbformat.read(path, as_version=4).cells
    exported = [c.source for c in cells if c.cell_type == "code" and re.match(r"#\|\s*export", c.source)]
    subtitle = [line[2:] for line in cells[0].source.splitlines() if line.startswith("> ")]
    return path.stem, len(cells), sum(s.count("\n") for s in exported), " ".join(subtitle)


def imported(module, known):
    "Modules of the book that a module imports, in reading order."
    tree = ast.parse((ROOT / "reidbook" / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    found = {to for node in ast.walk(tree) for to in targets(node, module)} - {module}
    return [m for m in known if m in found]


def in_reading_order(page): return sorted(page, key=page.get)


if __name__ == "__main__":
    rows = [page_row(p) for p in sorted((ROOT / "nbs").glob("*.ipynb"))]
    for name, cells, lines, job in rows: print(f"{name:26s} {cells:4d} cells {lines:5d} lines  {job}")
    print(f"{len(rows)} notebooks, {sum(r[1] for r in rows)} cells, {sum(r[2] for r in rows)} exported lines\n")
    known = in_reading_order(pages())
    for module in known: print(f"{module:22s} imports {', '.join(imported(module, known)) or 'nothing of the book'}")
