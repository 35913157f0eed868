"The study: its driver, and what is said about differences between seeds."
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from reidbook import seeds
from reidbook.batch import read_grid

ROOT = Path(__file__).parent.parent


def drive(grid, out, root):
    words = [sys.executable, ROOT / "tests/gpu/study.py", grid, "--out", out]
    env = {"PATH": "/usr/bin:/bin", "REIDBOOK_DATA": str(root), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env)


def test_rows_are_made_once_and_a_failure_is_no_row(tmp_path, root):
    grid, out = tmp_path / "grid.yaml", tmp_path / "out.csv"
    grid.write_text("- {datasets: [synthetic-tiny], methods: [baseline, nbs/examples/truth.py, nosuch], settings: {epochs: 1, iterations: 2}}\n")
    first = drive(grid, out, root)
    assert first.returncode == 0, first.stderr
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert {row["method"] for row in rows} == {"baseline", "nbs/examples/truth.py"}
    assert all(0 < float(row["mAP"]) <= 1 and row["steps"] == "2" and row["curve"].startswith("1:0.") for row in rows)
    assert float(next(row for row in rows if "truth" in row["method"])["label_pairwise_f"]) == 1
    assert "FAILED" in first.stdout and "unknown method 'nosuch'" in first.stdout
    grid.write_text("- {datasets: [synthetic-tiny], methods: [baseline], settings: {epochs: 1, iterations: 2}}\n")
    again = drive(grid, out, root)
    assert again.returncode == 0 and again.stdout == "" and list(csv.DictReader(out.read_text().splitlines())) == rows


def test_every_run_of_the_study_has_a_name_and_the_rows_are_of_the_grid():
    planned = {(r["dataset"], seeds.study_name(r["method"], json.dumps(r["settings"])), r["seed"])
               for r in read_grid(ROOT / "nbs/results/study.yaml")}
    study = seeds.read_study(ROOT / "nbs/results/study.csv")
    rows = set(zip(study.dataset, study.name, study.seed))
    assert len(rows) == len(study) and rows <= planned
    assert set(seeds.CONTROLS) < set(seeds.NAMES.values())


@pytest.mark.parametrize("n", [2, 5, 12])
def test_interval_and_holm_are_those_of_scipy(n):
    rng = np.random.default_rng(n)
    x = rng.normal(1, 2, n)
    mean, half, p = seeds.interval(x)
    low, high = stats.ttest_1samp(x, 0).confidence_interval()
    assert np.allclose([mean - half, mean + half, p], [low, high, stats.ttest_1samp(x, 0).pvalue])
    ps = rng.uniform(size=n)
    order = np.argsort(ps)
    slow = [max(min(1, (n - j) * ps[order[j]]) for j in range(i + 1)) for i in range(n)]
    assert np.allclose(seeds.holm(ps)[order], slow)


def test_pairs_need_both_runs():
    rows = [dict(dataset="d", name=n, seed=s, mAP=m) for n, s, m in [("baseline", 1, .5), ("baseline", 2, .6), ("ICSR", 1, .6), ("ICSR", 3, .9)]]
    found = seeds.against(pd.DataFrame(rows), "baseline", "d")
    assert found.pairs["ICSR"] == 1 and np.isclose(found.points["ICSR"], 10) and np.isnan(found.half["ICSR"])
