"The library imports and searches exactly where faiss, numba, papermill and nbdev are missing, as on a lent GPU machine."
import subprocess
import sys
from pathlib import Path

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}: raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""
SEARCH = """
import numpy as np
from reidbook.clustering import dbscan, min_similarity
from reidbook.neighbors import jaccard_similarity, knn
x = np.random.default_rng(0).normal(size=(20, 8)).repeat(15, 0) + 0.3 * np.random.default_rng(1).normal(size=(300, 8))
x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
sim, idx = knn(x, 20)
assert (idx == np.argsort(-(x @ x.T), 1, kind="stable")[:, :20]).mean() > 0.999
labels = dbscan(jaccard_similarity(x, 20, 6, min_similarity=min_similarity(0.6)), 0.6)
print(labels.tolist())
"""


def python(code):
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert p.returncode == 0, p.stderr
    return p.stdout.splitlines()[-1:] or [""]


def test_import_needs_no_development_package():
    modules = "data synthetic models neighbors clustering noise memory evaluation training methods.baseline runs cli site bench parallel batch speed vit adaptation pretraining methods.pplr methods.icsr methods.mprd methods.glc methods.purification".split()
    blocked = {"nbdev", "fastcore", "execnb", "papermill", "faiss", "infomap", "dask", "distributed"}
    python(BLOCKED.format(blocked=blocked) + "import " + ", ".join(f"reidbook.{m}" for m in modules))


def test_search_is_exact_without_faiss_and_numba():
    with_all = python(SEARCH)
    assert python(BLOCKED.format(blocked={"faiss"}) + SEARCH) == with_all
    assert python(BLOCKED.format(blocked={"faiss", "numba"}) + SEARCH) == with_all
