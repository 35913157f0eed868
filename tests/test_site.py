"The site of this checkout builds and holds together; toys cover what a checkout in order never shows."
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import yaml

from reidbook.site import (SCRIPT, build_site, check_cells, check_notebook, check_page, check_site, check_sources, finished_runs, front_matter,
                           is_progress, markdown_html, options, prepare, present, read_bib, read_config, readme_text, reading_order, render_plain)

ROOT = Path(__file__).parents[1]
RUN = dict(title="baseline on synthetic-tiny", description="A run", dataset="synthetic-tiny", method="baseline", seed=1, mAP=41.25, rank1=60.0, minutes=1.5)


def write_run(nbs, name, status="done", **front):
    folder = nbs / "runs" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"status": status, "metrics": {"mAP": 0.4}}))
    (folder / "metrics.jsonl").write_text('{"epoch": 0}\n')
    (folder / "checkpoint.pt").write_bytes(b"0" * 100)
    head = nbformat.v4.new_raw_cell("---\n" + yaml.safe_dump(front) + "---")
    picture = nbformat.v4.new_output("display_data", {"image/png": "aGk="})
    cells = [head, nbformat.v4.new_markdown_cell("## Result"), nbformat.v4.new_code_cell("plot()", outputs=[picture])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "run.ipynb")


def copy_checkout(root, nbs=ROOT / "nbs"):
    shutil.copytree(nbs, root / "nbs", ignore=shutil.ignore_patterns("runs", ".ipynb_checkpoints", "*.tmp"))
    shutil.copytree(ROOT / "reidbook", root / "reidbook", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("_quarto.yml", "settings.ini"): shutil.copy2(ROOT / name, root)
    return root


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    "One build of a copy of this checkout with three runs, two finished and one still running: (checkout, site)."
    root = copy_checkout(tmp_path_factory.mktemp("checkout"))
    write_run(root / "nbs", "one", **RUN)
    write_run(root / "nbs", "two", **{**RUN, "seed": 2, "mAP": 39.5, "title": "second seed"})
    write_run(root / "nbs", "half", status="running", **RUN)
    (root / "nbs" / "runs" / "torn").mkdir()
    (root / "nbs" / "runs" / "torn" / "run.ipynb").write_text('{"cells": [')
    return root, build_site(root / "out" / "site", quarto=False, root=root)


@pytest.fixture
def small(bare):
    "A checkout of three small pages and one run: processed in seconds."
    for page in ("index", "07_memory"):
        cells = [nbformat.v4.new_markdown_cell(f"# {page}\n\n> A page\n\nWords."), nbformat.v4.new_code_cell("#| hide\nsecret = 1")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), bare / "nbs" / f"{page}.ipynb")
    write_run(bare / "nbs", "one", **RUN)
    write_run(bare / "nbs", "half", status="running", **RUN)
    return bare


def test_sources_of_this_checkout():
    assert check_sources(ROOT) == []


def test_site_of_this_checkout(built):
    root, site = built
    assert check_site(site, root) == []


def test_configuration_works_as_it_is_in_proc(built):
    config, proc = yaml.safe_load((ROOT / "_quarto.yml").read_text()), built[0] / "_proc"
    named = [f for _, f in reading_order(config["website"]["sidebar"]["contents"])] + [config["bibliography"], config["format"]["html"]["css"]]
    assert [f for f in named if not (proc / f).is_file()] == []
    assert config["format"]["html"]["html-math-method"] == "mathml" and config["execute"] == {"enabled": False}
    assert "runs/*/run.ipynb" in config["project"]["render"] and config["project"]["output-dir"] == "_docs"
    about = ConfigParser(interpolation=None, delimiters=["="])
    about.read(ROOT / "settings.ini")
    assert about["DEFAULT"]["title"] == config["website"]["title"] and about["DEFAULT"]["custom_quarto_yml"] == "True"


def test_processed_pages(built):
    proc = built[0] / "_proc"
    for path in proc.rglob("*.ipynb"):
        nb = nbformat.read(path, 4)
        nbformat.validate(nb)
        assert front_matter(nb.cells)[0].get("title"), path.name
        assert not [c.source for c in nb.cells if re.match(r"#\|\s*(export|hide|default_exp)\b", c.source)], path.name
    memory = [c.source for c in nbformat.read(proc / "07_memory.ipynb", 4).cells]
    at = next(n for n, s in enumerate(memory) if s.endswith("show_doc(ClusterMemory)"))
    assert "class ClusterMemory" in memory[at + 1]  # the code stays, under its documentation


def loaded(source):
    "The `#|` lines of a cell as Quarto reads them: one piece of YAML, or None."
    head = re.match(r"(?:#\|[^\n]*(?:\n|$))*", source)[0]
    return yaml.safe_load("\n".join(line[2:].removeprefix(" ") for line in head.splitlines()))


def test_front_matter_and_options_are_yaml(built):
    "As Quarto reads them: nothing of nbdev's is left, every key is one that Quarto knows, every caption is a text and belongs to one picture."
    for path in (built[0] / "_proc").rglob("*.ipynb"):
        nb = nbformat.read(path, 4)
        front = yaml.safe_load(nb.cells[0].source.strip().strip("-"))
        assert isinstance(front["title"], str) and isinstance(front["description"], str) and front["output-file"].endswith(".html"), path.name
        for n, cell in enumerate(c for c in nb.cells if c.cell_type == "code"):
            known = loaded(cell.source) or {}
            assert isinstance(known, dict) and known == options(cell.source)[0], f"{path.name}, code cell {n}: {known}"
            assert set(known) <= {"fig-cap", "fig-alt", "echo", "output", "code-fold", "label", "warning"}, f"{path.name}, code cell {n}: {set(known)}"
            assert all(isinstance(known.get(k, ""), str) for k in ("fig-cap", "fig-alt")), f"{path.name}, code cell {n}"
            pictures = sum(any(kind.startswith("image/") for kind in o.get("data", {})) for o in cell.outputs)
            assert "fig-cap" not in known or pictures == 1, f"{path.name}, code cell {n}: a caption for {pictures} pictures"


def test_documentation_leads_its_code_without_a_signature_and_progress_bars_are_gone(built):
    for path in (built[0] / "_proc").glob("*.ipynb"):
        cells = nbformat.read(path, 4).cells
        for n, cell in enumerate(cells):
            assert not [o for o in cell.get("outputs", []) if is_progress(o)], f"{path.name}, cell {n}"
            if not (m := re.search(r"show_doc\((\w+)\)$", cell.source)) or cell.cell_type != "code" or path.name == "24_site.ipynb": continue
            assert "```python" not in cell.outputs[0].data["text/markdown"], f"{path.name}: {m[1]}"
            names = [re.search(r"show_doc\((\w+)\)$", c.source) for c in cells[n:n + 20]]
            names = [x[1] for x in names[:names.index(None)]]
            code = cells[n + len(names)].source
            where = [m.start() for name in names if (m := re.search(rf"^(?:def|class) {name}\b", code, re.M))]
            assert len(where) == len(names) and where == sorted(where), f"{path.name}: {names} do not stand before their code, or not in its order"


def test_listing_and_run_pages(built):
    root, site = built
    results = (site / "results.html").read_text()
    assert results.index("baseline on synthetic-tiny") < results.index("second seed")  # sorted by dataset, method, seed
    assert "41.25" in results and "runs/one/run.html" in results and "half" not in results
    page = (site / "runs" / "one" / "run.html").read_text()
    assert '<dl class="facts">' in page and "../../styles.css" in page and (site / "runs" / "one" / "metrics.jsonl").exists()
    assert not list(site.rglob("*.pt")) and not list((root / "_proc").rglob("*.pt"))
    for name in ("half", "torn"): assert not (site / "runs" / name).exists() and not (root / "_proc" / "runs" / name).exists()


def test_plain_build_says_so_and_needs_no_network(built):
    for page in built[1].rglob("*.html"):
        text = page.read_text()
        assert "Quarto was not found" in text
        assert "`" not in re.search(r'<p class="subtitle">(.*?)</p>', text)[1], page.name
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']https?:", text), page.name


def test_previous_and_next_follow_the_sidebar(built):
    site = built[1]
    order = re.findall(r'<a href="([^"]+)"', re.search(r'<nav class="book".*?</nav>', (site / "index.html").read_text(), re.S)[0])
    here, seen = "index.html", ["index.html"]
    while m := re.search(r'<a href="([^"]+)">[^<]* →</a>', (site / here).read_text()):
        here = m[1]
        seen.append(here)
    assert seen == order


def test_readme_is_fresh(built):
    assert (ROOT / "README.md").read_text() == readme_text(built[0] / "_proc"), "README.md is stale: python -c 'from reidbook.site import make_readme; make_readme()'"


def test_readme_links():
    text = (ROOT / "README.md").read_text()
    files = [a.partition("#")[0] for a in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in a]
    assert files and [f for f in files if f and not (ROOT / f).exists()] == []
    assert "{fig-alt" not in text and "<!--" not in text and not text.startswith("---")


@pytest.mark.parametrize("old, new, message", [
    ("</main>", '<a href="gone.html">x</a></main>', "link gone.html leads nowhere"),
    ("</main>", '<a href="memory.html#nowhere">x</a></main>', "no such anchor"),
    ("</main>", '<img src="gone.png" alt="x"></main>', "link gone.png leads nowhere"),
    ("</main>", "<p>[@nobody2020]</p></main>", "citation [@nobody2020] is not resolved"),
])
def test_injected_problems_are_found(built, old, new, message):
    page = built[1] / "index.html"
    text = page.read_text()
    try:
        page.write_text(text.replace(old, new, 1))
        assert [p for p in check_page(page, built[1]) if message in p]
    finally: page.write_text(text)


def test_a_run_without_front_matter_is_left_out_and_a_lost_page_is_found(built, monkeypatch):
    root, site = built
    monkeypatch.setattr("reidbook.site.check_page", lambda *_: [])  # pages are checked above
    write_run(root / "nbs", "bare", title="a run")
    try: assert ("bare", "its front matter lacks dataset, method, seed, mAP") in finished_runs(root / "nbs")[1]
    finally: shutil.rmtree(root / "nbs" / "runs" / "bare")
    write_run(root / "nbs", "late", **RUN)
    try: assert "runs/late/run.ipynb: not in the site" in check_site(site, root)
    finally: shutil.rmtree(root / "nbs" / "runs" / "late")


def test_a_deleted_chapter_is_left_out_by_name(small):
    (small / "nbs" / "index.ipynb").unlink()
    proc, config, notes = prepare(small)
    assert "index.ipynb is in _quarto.yml but not in nbs: left out" in notes and "run half left out: its status is 'running'" in notes
    assert [f for _, f in reading_order(config["website"]["sidebar"]["contents"])] == ["index.qmd", "07_memory.ipynb", "results.qmd"]
    out = render_plain(proc, config)
    assert "memory.html" in (out / "index.html").read_text() and "secret" not in (out / "memory.html").read_text()


def fake_quarto(folder, body):
    folder.mkdir(exist_ok=True)
    program = folder / "quarto"
    program.write_text(f"#!{sys.executable}\nimport sys, yaml, pathlib\n{body}")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    return program


def test_quarto_on_the_path_renders_proc(small, tmp_path, monkeypatch):
    body = """
config = yaml.safe_load(open("_quarto.yml"))
assert sys.argv[1:] == ["render"] and pathlib.Path.cwd().name == "_proc" and config["project"]["type"] == "website"
for name in ("index.ipynb", "results.qmd", "runs/one/run.ipynb", config["bibliography"], config["format"]["html"]["css"]): assert pathlib.Path(name).is_file(), name
assert not pathlib.Path("runs/half").exists() and "00_tour" not in open("_quarto.yml").read()
out = pathlib.Path(config["project"]["output-dir"]); out.mkdir()
(out / "index.html").write_text("made by quarto")
"""
    monkeypatch.setenv("PATH", f"{fake_quarto(tmp_path / 'bin', body).parent}{os.pathsep}{os.environ['PATH']}")
    out = build_site(root=small)
    assert out == small / "_docs" and (out / "index.html").read_text() == "made by quarto"


def test_a_failing_build_leaves_the_old_site(small, tmp_path):
    out = tmp_path / "site"
    out.mkdir()
    (out / "index.html").write_text("old")
    with pytest.raises(ValueError, match="(?s)exit code 3.*no such theme"):
        build_site(out, quarto=fake_quarto(tmp_path / "bin", "print('no such theme'); sys.exit(3)"), root=small)
    assert (out / "index.html").read_text() == "old"


def test_a_notebook_that_nbdev_cannot_process_is_named(small):
    cells = [nbformat.v4.new_markdown_cell("# Bad\n\n> page"), nbformat.v4.new_code_cell("#| export\ndef f(): return 1"), nbformat.v4.new_code_cell("import os\nlater.x")]
    assert check_cells(cells) == ["cell 2 mixes imports with other code"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), small / "nbs" / "07_memory.ipynb")
    with pytest.raises(ValueError, match="(?s)imports must stand in cells of their own.*notebook: Bad in cell"): build_site(root=small, quarto=False)


def test_a_caption_on_two_lines_reaches_the_page(small):
    picture = nbformat.v4.new_output("display_data", {"image/png": "aGk="})
    source = '#| fig-cap: "Two people, and how\n#|   the network tells them apart."\n#| fig-alt: "Two crops."\nplot()'
    cells = [nbformat.v4.new_markdown_cell("# Wide\n\n> page"), nbformat.v4.new_code_cell(source, outputs=[picture])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), small / "nbs" / "07_memory.ipynb")
    out = build_site(root=small, quarto=False)
    assert nbformat.read(small / "_proc" / "07_memory.ipynb", 4).cells[-1].source == source
    assert "Two people, and how the network tells them apart." in (out / "memory.html").read_text()


def test_without_nbdev_one_line_says_what_to_install(small):
    code = "import sys; sys.modules['nbdev'] = None; import reidbook.site as s; s.importlib.util.find_spec = lambda name: None; s.build_site(root=sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, small], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode and done.stderr.strip().endswith("ValueError: the site needs nbdev and pypandoc: pip install 'reidbook[site]'")


def test_a_folder_that_is_no_site_is_not_replaced(small, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="does not look like a site"): build_site(tmp_path, quarto=False, root=small)
    assert (tmp_path / "thesis.tex").exists()


def test_no_checkout(tmp_path):
    with pytest.raises(FileNotFoundError, match="_quarto.yml"): build_site(root=tmp_path)


@pytest.mark.parametrize("text, inside, outside", [
    ("$a_1$ and $b$", "<math", "$"), ("`$a$`", "<code>$a$</code>", "<math"), ("pay $5 or $6", "$5 or $6", "<math"), ("$$\n\\frac{1}{2}\n$$", 'display="block"', "$$"),
    ("a [x](y.html) b", '<a href="y.html">', "@"), ("    $REIDBOOK_DATA and $HOME", "$REIDBOOK_DATA", "<math"), ("::: {.callout-note}\n*hi*\n:::", "<em>hi</em>", ":::"),
    ("```{mermaid}\nflowchart LR\n  a[one: 1] -- if it must --> b{two}\n  b --> c[(three)] --> a\n```", "<li>one: 1 – if it must → two</li><li>two → three → one: 1</li>", "--"),
])
def test_markdown(text, inside, outside):
    out = markdown_html(text)
    assert inside in out and outside not in out


def test_bibliography_is_complete():
    entries = read_bib((ROOT / "nbs" / "references.bib").read_text())
    assert len(entries) == (ROOT / "nbs" / "references.bib").read_text().count("\n@") + 1
    for key, e in entries.items():
        assert e.get("author") and e.get("title") and e["issued"]["date-parts"][0][0] > 1950, key
        assert not set("{}\\") & set("".join(a.get("family", "") for a in e["author"]) + e["title"]), key


def test_small_parts(tmp_path):
    assert options("#| eval: false\nx") == ({"eval": False}, "x") and options("#| export\n#| hide\nx: int = 1") == ({}, "x: int = 1")
    assert options('#| fig-cap: "Left: right,\n#|   and more"\n#| fig-alt: >-\n#|   one\n#|   two\nx') == \
        ({"fig-cap": "Left: right, and more", "fig-alt": "one two"}, "x")
    with pytest.raises(ValueError, match="not YAML"): options('#| fig-cap: "never\n#|   closed\nx')
    word = nbformat.v4.new_code_cell('#| fig-cap: "what to\n#|   hide in it"\nx')
    assert check_cells([word]) == ["cell 0: an option goes on with nbdev's word 'hide': break the line elsewhere"]
    with pytest.raises(ValueError, match="quote a text with a colon.*left: right"): options("#| fig-cap: A figure, left: right\nx")
    assert re.findall(r'id="([^"]+)"', markdown_html("## 3. Why, then?\n\n## Why then")) == ["why-then", "why-then-1"]
    assert present([{"section": "A", "contents": ["no.ipynb"]}], tmp_path) == ([], ["no.ipynb"])
    (tmp_path / "broken.ipynb").write_text("{")
    assert "not a valid notebook" in check_notebook(tmp_path / "broken.ipynb", tmp_path, set())[0]
    assert '__name__ == "__main__"' in SCRIPT and "n_workers=0" in SCRIPT and read_config(ROOT)["project"]["type"] == "website"
