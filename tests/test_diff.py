"Notebooks as text: `make diff` shows prose and code, and the way through Markdown loses nothing."
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.skipif(not (BIN / "jupytext").exists() or not shutil.which("git") or not shutil.which("make"), reason="needs jupytext, git and make")


def write(path, number, printed):
    cells = [new_markdown_cell("# A page\n\n> About numbers"), new_code_cell(f"#| export\nx = {number}\nx", outputs=[new_output("stream", text=printed)]), new_code_cell("y = 1")]
    for n, c in enumerate(cells): c.id = f"{n:04d}abcd"
    nbformat.write(new_notebook(cells=cells), path)


def test_make_diff_shows_what_a_person_changed(tmp_path):
    for name in ("Makefile", ".gitattributes", "settings.ini", "setup.py", "constraints.txt"): shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nbs").mkdir()
    git = lambda *words: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=tmp_path, check=True, capture_output=True, text=True)
    diff = lambda *words: subprocess.run(["make", "-s", "diff", f"VENV={BIN.parent}", "-o", f"{BIN.parent}/.installed", *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    write(tmp_path / "nbs" / "01_a.ipynb", 3, "first output")
    git("init", "-q"), git("add", "-A"), git("commit", "-q", "-m", "one")
    assert diff() == ""
    write(tmp_path / "nbs" / "01_a.ipynb", 3, "second output")
    assert not [line for line in diff().splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    write(tmp_path / "nbs" / "01_a.ipynb", 4, "second output")
    changed = [line for line in diff().splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert changed == ["-x = 3", "+x = 4"]
    git("commit", "-q", "-a", "-m", "two")
    assert diff() == "" and "+x = 4" in diff("SINCE=HEAD~1")


def test_a_chapter_survives_markdown(tmp_path):
    shutil.copy(ROOT / "nbs" / "00_tour.ipynb", tmp_path)
    before = nbformat.read(tmp_path / "00_tour.ipynb", 4)
    jupytext = lambda *words: subprocess.run([BIN / "jupytext", "--quiet", *words], cwd=tmp_path, check=True)
    jupytext("--to", "md", "00_tour.ipynb")
    text = (tmp_path / "00_tour.md").read_text()
    (tmp_path / "00_tour.md").write_text(text.replace("# A tour", "# A walk", 1))
    jupytext("--update", "--to", "ipynb", "00_tour.md")
    after = nbformat.read(tmp_path / "00_tour.ipynb", 4)
    kept = lambda nb: [(c.source.strip(), c.get("outputs")) for c in nb.cells if c.source.strip()]
    assert after.cells[0].source.startswith("# A walk") and kept(after)[1:] == kept(before)[1:]
