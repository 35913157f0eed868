"Shared by all tests: their order, one thread, the reference implementations' vectors, a data root."
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # tests run two at a time
try: import faiss  # noqa: F401 (before any test loads infomap, which crashes in `modules()` otherwise: see 05_clustering)
except ImportError: pass


SECONDS = json.loads((Path(__file__).parent / "seconds.json").read_text())  # of one core, measured


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Longest first, so that two workers end at the same time; `make test` says `--dist loadgroup`.

    A file's tests share sets and sites, so they stay together. Tests of pages go one by one."""
    def name(item):
        chapter = "test_chapter_runs[" in item.nodeid
        return item.callspec.id if chapter else item.path.name
    for item in items:
        if item.path.name != "test_book.py": item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: -SECONDS.get(name(item), 1))


@pytest.fixture(scope="session")
def golden():
    "`golden(name)`: inputs and outputs of a reference implementation, from tests/golden/NAME.npz."
    folder = Path(__file__).parent / "golden"
    return lambda name: dict(np.load(folder / f"{name}.npz", allow_pickle=False))


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    "One data root for the session: the synthetic sets are rendered into it once."
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def bare(tmp_path):
    "A checkout without pages: what the site needs besides them."
    project, root = Path(__file__).parent.parent, tmp_path / "small"
    (root / "nbs").mkdir(parents=True)
    for name in ("styles.css", "plain.css", "plain.js", "plain.template", "references.bib", "results.qmd"): shutil.copy2(project / "nbs" / name, root / "nbs")
    for name in ("settings.ini", "_quarto.yml"): shutil.copy2(project / name, root)
    return root


def pytest_terminal_summary(terminalreporter):
    "The time each chapter took to execute, slowest first."
    times = sorted(((r.duration, r.nodeid.split("[")[1][:-1]) for r in terminalreporter.getreports("passed") if r.when == "call" and "test_chapter_runs[" in r.nodeid), reverse=True)
    if times: terminalreporter.write_sep("=", "time of each chapter")
    for seconds, name in times: terminalreporter.write_line(f"{seconds:6.1f} s  {name}")
