"What the pages say: spelling, names that exist, captions, endings, and docstrings of everything exported."
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path

import nbformat
import pytest

import reidbook
import reidbook.methods
from reidbook import settings
from reidbook.cli import parser
from reidbook.site import check_notebook, options, read_bib

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("nbs/*.ipynb"))
CHAPTERS = [p for p in PAGES if re.match(r"\d\d", p.stem) and p.stem not in ("00_notation",)]
BOOKS = {p.stem for p in PAGES}
MODULES = [m.name for m in pkgutil.iter_modules(reidbook.__path__) if m.name not in ("_modidx", "methods")]
MODULES += [f"methods.{m.name}" for m in pkgutil.iter_modules(reidbook.methods.__path__)]
METHODS = [importlib.import_module(f"reidbook.methods.{m.name}") for m in pkgutil.iter_modules(reidbook.methods.__path__)]
OWN = [getattr(m, name) for m in METHODS for name in ("METHOD", "PLUG") if hasattr(m, name)]
SETTINGS = set(settings.SETTINGS).union(*(cls.settings for cls in OWN), *(d for cls in OWN for d in cls.datasets.values()))
EXAMPLES = "\n".join(path.read_text() for path in sorted((ROOT / "nbs" / "examples").glob("*.py")))
SETTINGS |= set(re.findall(r"(\w+)=Setting\(", EXAMPLES))
SPELT = "vermillion,nd,ond,basline"  # our spelling, names, and a mistake that a page makes on purpose
FENCE = re.compile(r"^(`{3,}).*?^\1[ \t]*$", re.M | re.S)


@cache
def read(path): return nbformat.read(path, 4)
def cells(path, kind): return [c for c in read(path).cells if c.cell_type == kind]
def prose(path): return "\n\n".join(c.source for c in cells(path, "markdown"))
def quoted(path): return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", prose(path)))
def commands(text): return [line.strip().split("#")[0] for line in re.findall(r"(?:^ {4}|`)(reidbook [a-z][^`\n]*)", text, re.M)]


def said(path):
    "Everything a reader reads on a page: prose, captions, comments and docstrings of the code."
    code = [f"{options(c.source)[0].get('fig-cap', '')} {options(c.source)[0].get('fig-alt', '')}\n{options(c.source)[1]}" for c in cells(path, "code")]
    return prose(path) + "\n\n" + "\n\n".join(code)


def unknown_words(texts, tmp_path):
    for name, text in texts.items(): (tmp_path / f"{name}.md").write_text(re.sub(r"[\w.+-]*[@/][\w./@:+-]*", " ", text))  # no keys, no addresses
    p = subprocess.run([sys.executable, "-m", "codespell_lib", "--ignore-words-list", SPELT.lower(), str(tmp_path)], capture_output=True, text=True)
    return [line.removeprefix(str(tmp_path) + "/") for line in p.stdout.splitlines()]


def test_spelling(tmp_path):
    texts = {p.stem: said(p) for p in PAGES} | {"README": (ROOT / "README.md").read_text(), "data": (ROOT / "data" / "README.md").read_text()}
    assert unknown_words(texts, tmp_path) == []


def test_spelling_can_fail(tmp_path):
    assert unknown_words({"toy": "A pseudo lable is a guess, see [@recieve2020]."}, tmp_path) == ["toy.md:1: lable ==> label, ladle, labile, able"]


def missing_names(page, text):
    "Names in code quotes and commands of a page that do not exist: chapters, functions, settings, commands and their words."
    out = []
    for name in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", text)):
        if re.fullmatch(r"\d\d_[\w.]+(?:\.ipynb)?", name) and name.removesuffix(".ipynb") not in BOOKS: out.append(f"{page}: no chapter {name}")
        dotted = re.fullmatch(r"(?:reidbook\.)?(" + "|".join(re.escape(m) for m in MODULES if m != "batch") + r")\.([A-Za-z]\w*)(?:\([^)]*\))?", name)
        if dotted and not hasattr(importlib.import_module(f"reidbook.{dotted[1]}"), dotted[2]) and dotted[2] not in ("py", "yaml", "json", "ipynb", "npz", "ini"):
            out.append(f"{page}: no {name}")
    for line in commands(text):
        words = line.split()[1:]
        known = parser()._subparsers._group_actions[0].choices
        if words[0] in ("COMMAND", "...", "…"): continue
        if words[0] not in known: out.append(f"{page}: no command reidbook {words[0]}"); continue
        if words[0] == "bench": continue  # its words are checked by its own parser
        inner = known[words[0]]
        if words[0] == "data" and len(words) > 1: inner = inner._subparsers._group_actions[0].choices.get(words[1], inner)
        flags = {f for a in inner._actions for f in a.option_strings}
        out += [f"{page}: reidbook {words[0]} has no {w}" for w in words if w.startswith("-") and w not in flags]
    for name in re.findall(r"-p ([a-z_]\w*)=", text):
        if name not in SETTINGS | {"name"}: out.append(f"{page}: no setting {name}")
    return out


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_names_exist(path):
    assert missing_names(path.stem, prose(path)) == []


def test_names_exist_in_the_readme():
    assert missing_names("README", (ROOT / "README.md").read_text()) == []


@pytest.mark.parametrize("text, message", [
    ("See `03_modles`.", "no chapter 03_modles"), ("Call `noise.label_qualty`.", "no noise.label_qualty"), ("As in `reidbook runn`.", "no command reidbook runn"),
    ("Type\n\n    reidbook run --datset x\n", "reidbook run has no --datset"), ("With `-p epoch=3`.", "no setting epoch"),
])
def test_missing_names_are_found(text, message):
    assert missing_names("toy", text) == [f"toy: {message}"]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_links_and_citations(path):
    nbs = ROOT / "nbs"
    problems = [p for p in check_notebook(path, nbs, set(read_bib((nbs / "references.bib").read_text()))) if "link" in p or "bib" in p]
    from reidbook.site import markdown_html
    for file, anchor in re.findall(r"\]\(([\w.]*\.ipynb)?#([^)\s]+)\)", prose(path)):
        target = nbs / file if file else path
        heads = re.findall(r"^#+ .+$", prose(target), re.M) if target.exists() else []
        heads = re.findall(r' id="([^"]+)"', markdown_html("\n\n".join(heads)))
        if anchor not in heads: problems.append(f"no heading #{anchor} in {target.name}")
    assert problems == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_ending(path):
    "Every chapter ends with Summary, Exercises and References, and its exercises are numbered."
    heads = re.findall(r"^## (.+)$", prose(path), re.M)
    assert heads[-3:] == ["Summary", "Exercises", "References"]
    exercises = prose(path).split("## Exercises")[1].split("## References")[0]
    assert re.search(r"^1\. ", exercises.strip(), re.M)


def numbers(found): return [int(n) for some in found for n in some.split(" and ")]


def unanswered(stem, page, solutions):
    "Exercises of a page (its text) without an answer in the texts of the solutions, and answers without an exercise."
    exercises = numbers(re.findall(r"^(\d+)\. ", page.split("## Exercises")[1].split("\n## ")[0], re.M))
    head = f"{stem.split('_')[0]} {re.match('# (.+)', page)[1]}"
    parts = re.findall(rf"^## {re.escape(head)}$(.*?)(?=^## |\Z)", "\n\n".join(solutions), re.M | re.S)
    answers = numbers(re.findall(r"^\*\*(\d+(?: and \d+)*)\.\*\*", "\n".join(parts), re.M))
    return [f"{stem}: no answer to exercise {n}" for n in exercises if n not in answers] + [f"{stem}: answer {n} to no exercise, or twice" for n in answers if n not in exercises or answers.count(n) > 1]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_every_exercise_is_answered(path):
    assert unanswered(path.stem, prose(path), [prose(p) for p in PAGES if p.stem.startswith("solutions")]) == []


@pytest.mark.parametrize("answers, problems", [
    ("## 07 Toy\n\n**1 and 2.** Yes.", []), ("## 07 Toy\n\n**1.** Yes.", ["no answer to exercise 2"]), ("## 08 Toy\n\n**1 and 2.** Yes.", ["no answer to exercise 1", "no answer to exercise 2"]),
    ("## 07 Toy\n\n**1.** Yes.\n\n**2.** No.\n\n**3.** Perhaps.", ["answer 3 to no exercise, or twice"]),
])
def test_missing_answers_are_found(answers, problems):
    page = "# Toy\n\n> A page\n\n## Exercises\n\n1. Is it?\n2. Why?\n\n## References\n\n1. Nobody."
    assert unanswered("07_toy", page, ["# Solutions", answers]) == [f"07_toy: {p}" for p in problems]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_figures_have_captions(path):
    "A cell that shows a picture says what to see in it, and says it again for those who do not see it."
    for n, c in enumerate(cells(path, "code")):
        known = options(c.source)[0]
        if path.stem == "train" or "#| hide" in c.source or not any("image/png" in o.get("data", {}) for o in c.outputs): continue
        assert known.get("fig-cap") and known.get("fig-alt"), f"code cell {n}: {c.source[:80]!r}"


@pytest.mark.parametrize("name", MODULES)
def test_everything_exported_is_documented(name):
    "Functions, classes and their public methods have a docstring of their own; the module's first line is the chapter's subtitle."
    module = importlib.import_module(f"reidbook.{name}")
    assert module.__doc__
    bare = []
    for symbol in module.__all__:
        it = getattr(module, symbol)
        if not (inspect.isfunction(it) or inspect.isclass(it)) or it.__module__ != module.__name__: continue
        made = inspect.isclass(it) and is_dataclass(it) and (it.__doc__ or "").startswith(symbol + "(")
        if not it.__doc__ or made: bare.append(symbol)
    assert bare == []


def resolve(place):
    "The object that a place on the notation page names, such as noise.label_quality."
    name = next(m for m in sorted(MODULES, key=len, reverse=True) if place.startswith(m + "."))
    it = importlib.import_module(f"reidbook.{name}")
    for part in place[len(name) + 1:].split("."): it = getattr(it, part)
    return it


def names_of(it):
    "Parameters of a function or class, and fields and attributes of a class."
    fields = {k for c in getattr(it, "__mro__", ()) for k in getattr(c, "__annotations__", {})} | set(dir(it))
    return set(inspect.signature(it).parameters) | (fields if inspect.isclass(it) else set())


def notation_rows():
    text = prose(ROOT / "nbs" / "00_notation.ipynb")
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", r[0]), re.findall(r"`([^`]+)`", r[-1]) if len(r) == 5 else []) for r in rows]


def test_notation_names_live_where_the_page_says():
    placed = [(n, place[0]) for names, place in notation_rows() if place for n in names]
    assert len(placed) > 30
    calls = {"epoch": lambda it: True}  # of the state, not of a call
    assert [(n, p) for n, p in placed if n not in names_of(resolve(p)) and not (n in calls and callable(resolve(p)))] == []


def test_notation_has_every_setting_and_the_state():
    plain = {n for names, place in notation_rows() if not place for n in names}
    assert set(settings.SETTINGS) <= plain
    source = (ROOT / "reidbook" / "training.py").read_text()
    for name in (n for n in plain if n.startswith("t.")): assert re.search(rf"\b{re.escape(name)}\b|\b{name[2:]}=", source), name
