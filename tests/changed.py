"""What `make check` runs, as words for pytest: what is quick, and the tests of what changed since main.

A changed page gives its module, a module the tests that import it, a changed test itself. The nearest
come first, until three minutes on two cores are full. CI runs everything."""
import ast
import json
import subprocess
import sys
from pathlib import Path

from test_imports import notebooks, targets

HERE = Path(__file__).parent
ALWAYS = ["test_lint.py", "test_style.py", "test_words.py", "test_imports.py", "test_book.py::test_export_is_fresh",
          "test_book.py::test_notebook_is_clean", "test_book.py::test_title_stands_alone"]
SECONDS = json.loads((HERE / "seconds.json").read_text())  # of one core, by name; what is not there counts as 20
LIMIT = 200  # seconds of one core; what always runs takes some 80 more


def changed_files():
    "Files that differ from where this branch left main, uncommitted and new ones too."
    git = lambda *words: subprocess.run(["git", *words], cwd=HERE.parent, capture_output=True, text=True).stdout.splitlines()
    [since] = git("merge-base", "HEAD", "main") or ["HEAD"]
    return {*git("diff", "--name-only", since), *git("ls-files", "--others", "--exclude-standard")}


def imported(text):
    "Modules of the book that a test imports."
    return {to for node in ast.walk(ast.parse(text)) for to in targets(node, "")}


def concerned(files, page, tests):
    "Tests of changed files, nearest first. `page`: module -> its notebooks; `tests`: file name -> text."
    names = sorted(Path(f).stem for f in files if f.startswith("nbs/") and f.endswith(".ipynb"))
    modules = {m for m, notebooks in page.items() if {*notebooks} & {*names}}
    own = [t for t in tests if f"tests/{t}" in files]
    namesakes = [t for t in tests if t in {f"test_{m.split('.')[-1]}.py" for m in modules}]
    chapters = [f"test_book.py::test_chapter_runs[{n}]" for n in names if n != "train"]
    importers = [t for t, text in tests.items() if modules & imported(text)]
    return list(dict.fromkeys(own + namesakes + chapters + importers))


def seconds(test): return SECONDS.get(test.removesuffix("]").split("[")[-1], 20)


def fitting(tests, limit=LIMIT):
    "Those that fit into `limit` seconds together, in their order, and the others."
    fit, rest = [], []
    for test in tests:
        fits = sum(map(seconds, fit)) + seconds(test) <= limit
        (fit if fits else rest).append(test)
    return fit, rest


if __name__ == "__main__":
    texts = {p.name: p.read_text(encoding="utf-8") for p in sorted(HERE.glob("test_*.py"))}
    fit, rest = fitting([t for t in concerned(changed_files(), notebooks(), texts) if t not in ("test_book.py", *ALWAYS)])
    if rest: print("no time here, CI runs them:", *rest, file=sys.stderr)
    print(*(f"tests/{t}" for t in ALWAYS + fit))
