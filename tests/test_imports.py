"The library imports and searches exactly where faiss, numba, papermill and nbdev are missing, as on a lent GPU machine."
import ast
import re
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
    modules = "data images sampling checks synthetic models neighbors clustering noise memory evaluation settings checkpoints open_set training methods.baseline runs cli site bench parallel batch speed vit adaptation pretraining methods.pplr methods.icsr methods.mprd methods.glc methods.purification methods.ncplr methods.spcl methods.ise methods.o2cap methods.dcmip".split()
    modules = [m for m in modules if (ROOT / "reidbook" / (m.replace(".", "/") + ".py")).exists()]  # a reader may delete a method
    blocked = {"nbdev", "fastcore", "execnb", "papermill", "faiss", "infomap", "dask", "distributed"}
    python(BLOCKED.format(blocked=blocked) + "import " + ", ".join(f"reidbook.{m}" for m in modules))


def test_search_is_exact_without_faiss_and_numba():
    with_all = python(SEARCH)
    assert python(BLOCKED.format(blocked={"faiss"}) + SEARCH) == with_all
    assert python(BLOCKED.format(blocked={"faiss", "numba"}) + SEARCH) == with_all


ROOT = Path(__file__).parent.parent


def pages():
    "Module -> the notebook that it is exported from; notebooks are numbered in reading order."
    out = {}
    for path in sorted((ROOT / "reidbook").rglob("*.py")):
        made_from = re.search(r"File to edit: (?:\.\./)+nbs/(.+?)\.ipynb", path.read_text(encoding="utf-8"))
        if made_from: out[".".join(path.relative_to(ROOT / "reidbook").with_suffix("").parts)] = made_from[1]
    return out


def notebooks():
    "Module -> all notebooks that export into it, the one that made it first."
    cells = lambda m: re.findall(r"^# %% (?:\.\./)+nbs/(.+?)\.ipynb", (ROOT / "reidbook" / (m.replace(".", "/") + ".py")).read_text(encoding="utf-8"), re.M)
    return {m: list(dict.fromkeys([first, *cells(m)])) for m, first in pages().items()}


def targets(node, module):
    "Modules of the book that one node of a syntax tree imports, wherever in the file it stands."
    if isinstance(node, ast.ImportFrom):
        above = module.split(".")[:-node.level] if node.level else []
        if not node.level and (node.module or "").split(".")[0] != "reidbook": return []
        base = above + [w for w in (node.module or "").split(".") if w and w != "reidbook"]
        return [".".join(base)] + [".".join([*base, a.name]) for a in node.names]
    if isinstance(node, ast.Import): return [a.name.removeprefix("reidbook.") for a in node.names]
    called = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module"
    return [a.value.removeprefix("reidbook.") for a in node.args if isinstance(a, ast.Constant)] if called else []


def backward(sources, page):
    "Imports that point to the same page or a later one. `sources`: module -> text."
    found = set()
    for module, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            found |= {(module, to) for to in targets(node, module) if to != module and page.get(to, "") >= page[module]}
    return sorted(found)


def test_imports_point_one_way_along_the_reading_order():
    page = pages()
    assert len(page) > 25
    assert backward({m: (ROOT / "reidbook" / (m.replace(".", "/") + ".py")).read_text(encoding="utf-8") for m in page}, page) == []


def test_an_import_against_the_reading_order_is_found():
    page = {"data": "01_data", "runs": "20_runs", "methods.glc": "14_methods.glc", "methods.pplr": "11_methods.pplr"}
    for text in ("from . import runs", "from reidbook import runs", "import reidbook.runs", "def f():\n    from .runs import x",
                 "import importlib\nimportlib.import_module('reidbook.runs')"):
        assert backward({"data": text}, page) == [("data", "runs")], text
    assert backward({"runs": "from . import data\nfrom .methods import glc\nimport numpy"}, page) == []
    assert backward({"methods.pplr": "from . import glc", "methods.glc": "from .. import data"}, page) == [("methods.pplr", "methods.glc")]


def test_a_module_of_several_pages_stands_in_reading_order():
    several = {m: names for m, names in notebooks().items() if len(names) > 1}
    assert several["neighbors"][:2] == ["04_neighbors", "04a_engine"]
    for module, names in several.items():
        assert names == sorted(names), f"{module} is exported from {names}: nbdev writes pages in this order"
        prefix = {n.split("_")[0].rstrip("abcdefgh") for n in names}
        assert len(prefix) == 1, f"{module}: {names} do not stand together in the book"


def test_methods_do_not_import_one_another():
    page = pages()
    own = [m for m in page if m.startswith("methods.")]
    for module in own:
        tree = ast.parse((ROOT / "reidbook" / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        others = {to for node in ast.walk(tree) for to in targets(node, module)} & set(own) - {module, "methods.baseline"}
        assert not others, f"{module} imports {others}"


def test_the_house_lists_every_page_and_imports_of_lower_rooms_only():
    said = subprocess.run([sys.executable, "tests/house.py"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for path in (ROOT / "nbs").glob("*.ipynb"): assert f"\n{path.stem} " in "\n" + said
    assert re.search(r"^noise +imports neighbors, images$|^noise +imports images, neighbors$", said, re.M)
