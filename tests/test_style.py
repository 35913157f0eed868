"Code that fits the page: lines of at most 100 columns, cells of at most 45 lines, pages of at most 100 cells."
from pathlib import Path

import nbformat
import pytest

PAGES = sorted((Path(__file__).parent.parent / "nbs").glob("*.ipynb"))
STILL_WIDE = set()  # to be wrapped; nothing is added here
STILL_LONG = set()


def sources(path): return [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
def wide(path): return [line for source in sources(path) for line in source.split("\n") if len(line) > 100]
def long(path): return [source.split("\n")[:2] for source in sources(path) if len(source.split("\n")) > 45]


@pytest.mark.parametrize("path", [p for p in PAGES if p.stem not in STILL_WIDE], ids=lambda p: p.stem)
def test_lines_fit(path): assert not wide(path)


@pytest.mark.parametrize("path", [p for p in PAGES if p.stem not in STILL_LONG], ids=lambda p: p.stem)
def test_cells_fit(path): assert not long(path)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_pages_can_be_read_in_one_sitting(path):
    assert len(nbformat.read(path, as_version=4).cells) <= 100, "a page that has grown two jobs becomes two pages"


def test_the_lists_of_what_is_left_are_true():
    assert {p.stem for p in PAGES if wide(p)} == STILL_WIDE and {p.stem for p in PAGES if long(p)} == STILL_LONG
