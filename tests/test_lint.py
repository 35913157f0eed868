"Mistakes that a machine finds: names that do not exist, imports nobody uses (ruff.toml says which rules and why)."
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
