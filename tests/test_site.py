"The site of this checkout builds and holds together; toys cover what a checkout in order never shows."
import json
import re
import shutil
import stat
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from reidbook.site import (build_site, check_notebook, check_site, check_sources, directives, expand, finished_runs, front_matter, heading_id,
                           link_symbols, linkable, markdown_html, process, read_bib, stage, symbols, untex)

ROOT = Path(__file__).parents[1]
RUN = dict(title="baseline on synthetic-tiny", description="A run", dataset="synthetic-tiny", method="baseline", seed=1, mAP=41.25, rank1=60.0, minutes=1.5)


def write_run(nbs, name, status="done", **front):
    folder = nbs / "runs" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"status": status, "metrics": {"mAP": 0.4}}))
    (folder / "metrics.jsonl").write_text('{"epoch": 0}\n')
    head = nbformat.v4.new_raw_cell("---\n" + yaml.safe_dump(front) + "---")
    nbformat.write(nbformat.v4.new_notebook(cells=[head, nbformat.v4.new_markdown_cell("## Result")]), folder / "run.ipynb")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    "A copy of this checkout's pages with three runs: two finished, one still running."
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "nbs", root / "nbs", ignore=shutil.ignore_patterns("runs", ".ipynb_checkpoints"))
    for name in ("_quarto.yml", "settings.ini"): shutil.copy2(ROOT / name, root)
    write_run(root / "nbs", "one", **RUN)
    write_run(root / "nbs", "two", **{**RUN, "seed": 2, "mAP": 39.5, "title": "second seed"})
    write_run(root / "nbs", "half", status="running", **RUN)
    return root


@pytest.fixture(scope="module")
def site(checkout):
    return build_site(checkout / "out" / "site", quarto=False, root=checkout)


def test_sources_of_this_checkout():
    assert check_sources(ROOT) == []


def test_site_of_this_checkout(site, checkout):
    assert check_site(site, checkout) == []


def test_listing_and_run_pages(site):
    results = (site / "results.html").read_text()
    assert results.index("baseline on synthetic-tiny") < results.index("second seed")  # sorted by dataset, method, seed
    assert "41.25" in results and "runs/one/run.html" in results and "half" not in results
    page = (site / "runs" / "one" / "run.html").read_text()
    assert '<dl class="facts">' in page and "../../styles.css" in page and (site / "runs" / "one" / "metrics.jsonl").exists()
    assert not (site / "runs" / "half").exists()


def test_plain_build_says_so_and_needs_no_network(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert "Quarto was not found" in text
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']https?:", text), page.name


def test_previous_and_next_follow_the_sidebar(site, checkout):
    staged_order = re.findall(r'<a href="([^"]+)"', re.search(r'<nav class="book".*?</nav>', (site / "index.html").read_text(), re.S)[0])
    here, seen = "index.html", ["index.html"]
    while m := re.search(r'<a href="([^"]+)">[^<]* →</a>', (site / here).read_text()):
        here = m[1]
        seen.append(here)
    assert seen == staged_order


def test_a_deleted_chapter_is_left_out_by_name(checkout, tmp_path, capsys):
    root = tmp_path / "book"
    shutil.copytree(checkout, root, ignore=shutil.ignore_patterns("out"))
    (root / "nbs" / "10_methods.baseline.ipynb").unlink()
    for name in ("06_noise.ipynb", "index.ipynb"): (root / "nbs" / name).unlink(missing_ok=True)
    out = build_site(root / "site", quarto=False, root=root)
    assert "06_noise.ipynb is in _quarto.yml but not in nbs" in capsys.readouterr().out
    assert (out / "index.html").exists() and not (out / "06_noise.html").exists()
    assert "06_noise" not in re.search(r'<nav class="book".*?</nav>', (out / "01_data.html").read_text(), re.S)[0]


def fake_quarto(folder, body):
    program = folder / "quarto"
    program.write_text(f"#!{sys.executable}\nimport sys, yaml, pathlib\n{body}")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    return program


def test_quarto_gets_a_complete_project(checkout, tmp_path):
    body = """
config = yaml.safe_load(open("_quarto.yml"))
assert sys.argv[1] == "render" and config["project"]["type"] == "website"
for name in config["project"]["render"] + [config["bibliography"], config["format"]["html"]["css"]]: assert pathlib.Path(name).is_file(), name
assert "listing" in open("results.qmd").read() and "runs/one/run.ipynb" in config["project"]["render"]
out = pathlib.Path(config["project"]["output-dir"]); out.mkdir()
(out / "index.html").write_text("made by quarto")
"""
    out = build_site(tmp_path / "site", quarto=fake_quarto(tmp_path, body), root=checkout)
    assert (out / "index.html").read_text() == "made by quarto"


def test_a_failing_build_leaves_the_old_site(checkout, tmp_path):
    out = tmp_path / "site"
    out.mkdir()
    (out / "index.html").write_text("old")
    with pytest.raises(ValueError, match="(?s)exit code 3.*no such theme"):
        build_site(out, quarto=fake_quarto(tmp_path, "print('no such theme'); sys.exit(3)"), root=checkout)
    assert (out / "index.html").read_text() == "old"


def test_a_folder_that_is_no_site_is_not_replaced(checkout, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="does not look like a site"): build_site(tmp_path, quarto=False, root=checkout)
    assert (tmp_path / "thesis.tex").exists()


def test_no_checkout(tmp_path):
    with pytest.raises(FileNotFoundError, match="_quarto.yml"): build_site(root=tmp_path)


def test_staged_cells(tmp_path):
    new = nbformat.v4
    picture = new.new_output("display_data", {"image/png": "aGk="})
    cells = [new.new_markdown_cell("# T\n\n> sub"), new.new_code_cell("#| default_exp x"), new.new_code_cell("#| hide\n1"),
             new.new_code_cell("#| export\ndef a_b(): pass"), new.new_code_cell("plot()", outputs=[picture]), new.new_markdown_cell("A *rising* curve. More.")]
    out = process(new.new_notebook(cells=cells), "t.ipynb")
    nbformat.validate(out)
    assert [c.source for c in out.cells[1:]] == ["[]{#sym-a_b}", "#| classes: exported\ndef a_b(): pass", '#| fig-alt: "A rising curve."\nplot()', "A *rising* curve. More."]
    assert front_matter(out.cells)[0] == {"title": "T", "description": "sub"}


def test_symbols_link_only_where_unmistakable():
    found = symbols(ROOT / "nbs")
    known = linkable(found)
    assert known["label_quality"].page == "06_noise.ipynb" and "knn" not in known and "neighbors.knn" in known
    assert link_symbols("```\n`label_quality`\n```", known) == "```\n`label_quality`\n```"


@pytest.mark.parametrize("text, inside, outside", [
    ("$a_1$ and $b$", "<math", "$"), ("`$a$`", "<code>$a$</code>", "<math"), ("pay $5 or $6", "$5 or $6", "<math"), ("$$\n\\frac{1}{2}\n$$", 'display="block"', "$$"),
    ("a [x](y.html) b", '<a href="y.html">', "@"), ("    $REIDBOOK_DATA and $HOME", "$REIDBOOK_DATA", "<math"), ("::: {.callout-note}\n*hi*\n:::", "<em>hi</em>", ":::"),
])
def test_markdown(text, inside, outside):
    out = markdown_html(text)
    assert inside in out and outside not in out


def test_bibliography_is_complete():
    entries = read_bib((ROOT / "nbs" / "references.bib").read_text())
    assert len(entries) == (ROOT / "nbs" / "references.bib").read_text().count("\n@") + 1
    for key, e in entries.items():
        assert e.get("author") and e.get("title") and re.fullmatch(r"\d{4}", e.get("year", "")), key
        assert not set("{}\\") & set(e["author"] + e["title"]), key
    assert untex("Lov{\\'a}sz") == "Lovász"


def test_small_parts(tmp_path):
    assert directives("#| eval: false\nx")[0] == {"eval": False}
    assert heading_id("Why, then?", {"why-then"}) == "why-then-1"
    assert expand([{"section": "A", "contents": ["no.ipynb"]}], tmp_path) == ([], ["no.ipynb"])
    (tmp_path / "broken.ipynb").write_text("{")
    assert "not a valid notebook" in check_notebook(tmp_path / "broken.ipynb", tmp_path, set())[0]
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "manifest.json").write_text("{")
    good, left_out = finished_runs(tmp_path)
    assert not good and left_out[0][0] == "x"
