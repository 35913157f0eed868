"Mistakes that a machine finds: names, imports (ruff.toml says which rules and why), types (mypy.ini)."
import re
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent


def ruff(*paths):
    "Findings of ruff, one a line."
    words = [sys.executable, "-m", "ruff", "check", "--no-cache", "--quiet", "--config", ROOT / "ruff.toml", "--output-format", "concise"]
    return subprocess.run([*words, *paths], capture_output=True, text=True, cwd=ROOT).stdout.splitlines()


def test_ruff_finds_nothing():
    assert ruff("nbs", "reidbook", "tests", "setup.py") == []


def test_ruff_reads_pages(tmp_path):
    "A page with a name that only a later cell would have had is found."
    cells = [nbformat.v4.new_code_cell(source) for source in ("import numpy as np", "print(feats)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "page.ipynb")
    assert [re.search(r" ([A-Z]+\d+) ", line)[1] for line in ruff(tmp_path)] == ["F401", "F821"]


def mypy(*paths):
    "Errors of mypy in these files, or in those that mypy.ini names."
    words = [sys.executable, "-m", "mypy", "--cache-dir", "/dev/null", "--config-file", ROOT / "mypy.ini", *paths]
    said = subprocess.run(words, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    return [line for line in said if " error: " in line] or ([] if said[-1].startswith("Success") else said)


def test_types_of_the_package():
    assert mypy() == []


def test_mypy_reads_functions_without_types(tmp_path):
    (tmp_path / "toy.py").write_text("from pathlib import Path\n\ndef f():\n    return Path('a').sufix\n")
    assert ["attr-defined" in line for line in mypy(tmp_path / "toy.py")] == [True]
