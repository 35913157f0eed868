"A method in a file of somebody else's: found, run, resumed, told apart, and its errors said in one line with file and line."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reidbook import batch, own, runs, training
from reidbook.cli import main
from reidbook.data import open_dataset
from reidbook.methods import baseline

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "nbs" / "examples" / "steady.py"
SHORT = {"epochs": 1, "iterations": 2}
MINE = """from reidbook.methods.baseline import Baseline
from reidbook.training import Plug, Setting

class Mine(Baseline):
    settings = Baseline.settings | dict(speed=Setting(1.0, "of nothing", above=0))

    def loss(self, t, batch):
        return super().loss(t, batch)

class Last(Plug):
    settings = dict(share=Setting(0.5, "of nothing", low=0))

    def labels(self, t, feats, labels): return labels

METHOD, PLUG = Mine, Last
"""


def write(folder, text=MINE, name="mine.py"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def described(word, root, **settings): return runs.describe("synthetic-tiny", word, root=root, settings=SHORT | settings)


def command(*words, cwd, out, root):
    "`reidbook` in a process of its own that stands in another folder."
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "REIDBOOK_RUNS": str(out), "REIDBOOK_DATA": str(root)}
    short = [x for k, v in SHORT.items() for x in ("-p", f"{k}={v}")]
    return subprocess.run([sys.executable, "-m", "reidbook.cli", *words, *short], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


WRONG = {
    "syntax": (MINE.replace("def loss(self, t, batch)", "def loss(self, t batch)"), "mine.py, line 7: SyntaxError"),
    "indent": (MINE.replace("    def loss", "   def loss"), "mine.py, line 7: IndentationError"),
    "null byte": (MINE + "\0", "mine.py"),
    "no text": (b"\xff\xfe\x00\x80", "mine.py"),
    "no name": (MINE.replace("Mine(Baseline)", "Mine(Basline)"), "mine.py, line 4: NameError: name 'Basline'"),
    "no package": ("\nimport helpers\n" + MINE, "mine.py, line 2: ModuleNotFoundError: No module named 'helpers'"),
    "raises": (MINE + "raise RuntimeError('first\\nsecond')", "mine.py, line 16: RuntimeError: first"),
    "exits": (MINE + "import sys; sys.exit(0)", "mine.py, line 16: SystemExit"),
    "no METHOD": (MINE.replace("METHOD, PLUG", "METHODS, PLUG"), "mine.py: no METHOD"),
    "an instance": (MINE.replace("= Mine, Last", "= Mine(), Last"), "mine.py, line 15: METHOD is <"),
    "a plug": (MINE.replace("= Mine, Last", "= Last, Mine"), "mine.py, line 15: METHOD is <class"),
    "a hook too short": (MINE.replace("def loss(self, t, batch)", "def loss(self, batch)"), "mine.py, line 7: loss(self, batch); expected loss(self, t, batch)"),
    "a hook of another name": (MINE.replace("def loss(", "def losses("), "mine.py, line 7: losses(self, t, batch) is no hook, nobody would call it: did you mean loss?"),
    "lost settings": (MINE.replace("Baseline.settings | ", ""), "mine.py, line 5: the settings of Mine leave out temperature, momentum, update of Baseline"),
    "settings of another kind": (MINE.replace("Baseline.settings | dict(", "list("), "mine.py, line 5: TypeError"),
    "nothing but a name": ("from reidbook.training import Method\nclass Mine(Method): pass\nMETHOD = Mine", "mine.py: Mine must define labels and loss"),
    "check in an unknown name": (MINE.replace("    def loss", "    @staticmethod\n    def check(s): s.sped\n\n    def loss"), "mine.py, line 8: AttributeError: no setting 'sped'"),
    "check with self": (MINE.replace("    def loss", "    def check(self, s): pass\n\n    def loss"), "mine.py, line 7: check(self, s); expected check(s)"),
    "__init__ with words": (MINE.replace("    def loss", "    def __init__(self, speed): pass\n\n    def loss"), "mine.py, line 7: __init__(self, speed); expected __init__(self)"),
}


@pytest.mark.parametrize("text, said", WRONG.values(), ids=WRONG)
def test_a_mistake_is_one_line_that_names_file_and_line(text, said, tmp_path, monkeypatch, capsys, root):
    "With code 2, and before anything is written: no run, no cache beside the file."
    monkeypatch.setenv("REIDBOOK_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(write_any(tmp_path / "here", text).parent)
    for words in (["run", "--dataset", "synthetic-tiny", "--method", "mine.py"], ["run", "--method", "mine.py", "--show-settings"],
                  ["batch", "--datasets", "synthetic-tiny", "--methods", "baseline,mine.py"]):
        assert main([*words, "--root", str(root)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and said in err and "Traceback" not in err and len(err) < 500, err
    assert not (tmp_path / "runs").exists() and [p.name for p in Path().iterdir()] == ["mine.py"]


def write_any(folder, text):
    path = write(folder, "")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("word, said", [
    ("missing.py", "missing.py': no such file"), ("./missing", "no such file"), ("here", "unknown method"), ("./here", "expected a file of Python"), ("nowhere.mine", "finds no package nowhere"),
    ("email.nothing", "has no such module"), ("mine..py", "no such file"), (".py", "no such file"), ("a b.c", "expected a name, a file"), ("../", "expected a file of Python"), ("here/1st.py", "a letter first"),
    ("here/notes.txt", "expected a file of Python"), ("here/pipe.py", "expected a file of Python"), ("email.mime", "no METHOD"), ("~nobody/mine.py", ""), ("\0.py", ""),
])
def test_a_word_that_is_no_method(word, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("1st.py", "notes.txt"): write(tmp_path / "here", MINE, name)
    os.mkfifo(tmp_path / "here" / "pipe.py")
    assert main(["run", "--method", word, "--show-settings"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err, err


def test_from_any_folder_to_a_run_that_can_be_read_later(tmp_path, root):
    "Relative paths, the copy that is kept, the lists, going on from the copy, and an error while it trains."
    out = tmp_path / "runs"
    write(tmp_path / "lab" / "drafts")
    first = command("run", "--dataset", "synthetic-tiny", "--method", "drafts/mine.py", "-p", "speed=2", cwd=tmp_path / "lab", out=out, root=root)
    assert first.returncode == 0, first.stderr
    folder, = [d for d in out.iterdir() if d.name.startswith("synthetic-tiny-mine-s1-")]
    m = json.loads((folder / "manifest.json").read_text())
    name = own.full_name(folder / "mine.py")
    assert (folder / "mine.py").read_text() == MINE and m["parameters"]["method"] == name and m["sources"] == ["mine.py"] and name.startswith("mine:")
    assert str(tmp_path) not in (folder / "manifest.json").read_text() + (folder / "run.ipynb").read_text().replace(str(out), "")
    assert runs.ledger(out).method.to_list() == [name] and name in runs.results_table(runs.ledger(out)).method[0]
    assert name in runs.show_run("synthetic-tiny-mine", out) and "mine.py" in runs.show_run("synthetic-tiny-mine", out)
    (tmp_path / "lab" / "drafts" / "mine.py").unlink()
    again = command("run", "--dataset", "synthetic-tiny", "--method", str(folder / "mine.py"), "-p", "speed=2", cwd=tmp_path, out=out, root=root)
    assert again.returncode == 0 and "already done" in again.stdout, again.stderr
    write(tmp_path / "lab", MINE.replace("return super()", "x = t.settings.sped\n        return super()"))
    failed = command("run", "--dataset", "synthetic-tiny", "--method", "mine.py", cwd=tmp_path / "lab", out=out, root=root)
    last = failed.stderr.splitlines()[-1]
    assert failed.returncode == 1 and "failed: mine.py, line 8: AttributeError: no setting 'sped'" in last, failed.stderr
    other, = [d for d in out.iterdir() if d.name.startswith("synthetic-tiny-mine-s1-") and d != folder]
    assert runs.run_status(other)[1].startswith("mine.py, line 8")


def test_a_package_and_a_batch(tmp_path, root):
    "A module with relative imports, found where one stands, beside a file, in one batch; its error has a place too."
    out, lab = tmp_path / "runs", tmp_path / "lab"
    write(lab / "team", "", "__init__.py")
    write(lab / "team", "SPEED = 2.0\n", "common.py")
    write(lab / "team", MINE.replace("class Last", "from .common import SPEED\nclass Last"), "draft.py")
    write(lab)
    grid = write(lab, "datasets: synthetic-tiny\nmethods: [team.draft, mine.py]\nsettings: {speed: 3, correct: ./mine.py}\n", "grid.yaml")
    done = command("batch", "--file", grid.name, cwd=lab, out=out, root=root)
    assert done.returncode == 0, done.stdout + done.stderr
    table = runs.ledger(out)
    assert sorted(m.split(":")[0] for m in table.method) == ["draft", "mine"] and all('"correct": "mine:' in s for s in table.settings)
    folder, = [d for d in out.iterdir() if "-draft-" in d.name]
    assert sorted(p.name for p in folder.glob("*.py")) == ["mine.py", "team.common.py", "team.draft.py", "team.py"]
    write(lab / "team", "SPEED = 1 / 0\n", "common.py")
    wrong = command("run", "--dataset", "synthetic-tiny", "--method", "team.draft", cwd=lab, out=out, root=root)
    assert wrong.returncode == 2 and "common.py, line 1: ZeroDivisionError" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_content_makes_the_name_and_place_does_not(tmp_path, root):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", "# another comment\n" + MINE)
    c = write(tmp_path / "c", MINE.replace('"of nothing", above=0', '"of nothing", above=0.5'))
    one, two, other = (described(path, root) for path in (a, b, c))
    assert one.run_id == two.run_id and one.identity["method"] == two.identity["method"] and one.name == two.name
    assert one.run_id != other.run_id and one.identity["method"] != other.identity["method"] and one.identity["code"] != other.identity["code"]
    words = [runs.method_words(r.identity["method"], {}) for r in (one, other)]
    assert words[0] != words[1] and all(w.startswith("mine:") for w in words)
    renamed = write(tmp_path / "d", MINE, "baseline.py")
    assert described(renamed, root).identity["method"].startswith("baseline:") and described("baseline", root).identity["method"] == "baseline"


def test_a_changed_file_is_another_run(tmp_path, root):
    path = write(tmp_path)
    before = described(path, root)
    write(tmp_path, MINE.replace("return super().loss(t, batch)", "return {'memory': 2 * super().loss(t, batch)['memory']}"))
    after = described(path, root)
    assert before.name != after.name and before.method is not after.method
    write(tmp_path)
    assert described(path, root).name == before.name


def test_what_a_file_imports_of_the_methods_counts():
    def digest(text): return [name for name in own.imported(text, "reidbook.methods") if name.startswith("reidbook.methods.")]
    for text in ("from reidbook.methods.pplr import PPLR", "from reidbook.methods import pplr", "from . import pplr", "import reidbook.methods.pplr as p", "def f():\n    from .pplr import PPLR"):
        assert "reidbook.methods.pplr" in digest(text), text
    assert "reidbook.methods.pplr" not in digest("from ..neighbors import knn")


def test_the_code_of_an_imported_method_is_in_the_digest(tmp_path, monkeypatch):
    text = "from reidbook.methods.pplr import PPLR\nMETHOD = PPLR\n"
    path, before = write(tmp_path, text), runs.code_digest(str(write(tmp_path)))
    path = write(tmp_path, text)
    with_pplr = runs.code_digest(path)
    real = runs.bare
    monkeypatch.setattr(runs, "bare", lambda source: real(source.replace("beta=0.5", "beta=0.6")))
    assert runs.code_digest(path) != with_pplr and before == runs.code_digest(str(write(tmp_path)))


def test_a_plug_is_known_by_its_content(tmp_path, root):
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    c = write(tmp_path / "c", MINE.replace("return labels", "return labels * 1"))
    plain, one, two, other = (described("baseline", root, **({"correct": str(x)} if x else {})) for x in ("", a, b, c))
    assert one.run_id == two.run_id and len({plain.run_id, one.run_id, other.run_id}) == 3 and one.settings.share == 0.5 and one.files == {"mine.py": a}
    assert one.settings.origins["share"] == "plug mine" and training.find_plug(str(a)).__name__ == "Last"
    swapped = write(tmp_path / "d", MINE.replace("METHOD, PLUG = Mine, Last", "METHOD = PLUG = Mine"))
    with pytest.raises(ValueError, match="line 15: PLUG is .*inherits from Plug"): described("baseline", root, correct=str(swapped))
    with pytest.raises(ValueError, match="two files of one name"): described(a, root, correct=str(c))
    with pytest.raises(ValueError, match="no PLUG"): described("baseline", root, correct=str(EXAMPLE))


def test_a_method_may_bring_its_own_plug(tmp_path, root):
    a, b = (write(tmp_path / x, MINE.replace("dict(speed", "dict(correct=__file__, speed")) for x in "ab")
    one, two = described(a, root), described(b, root)
    assert one.run_id == two.run_id and training.find_plug(one.settings.correct).__name__ == "Last" and one.identity["settings"]["correct"] == one.identity["method"]


def test_a_copy_of_a_shipped_method_is_that_method(tmp_path, root):
    "Relative imports as they are, the same records, another name."
    path = write(tmp_path, Path(baseline.__file__).read_text(), "baseline.py")
    records = []
    for word in ("baseline", path):
        run = runs.begin("synthetic-tiny", word, root=root, out=tmp_path / f"{type(word).__name__}", settings=SHORT)
        records += list(training.epochs(run.state))
    same = [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in records]
    assert same[0] == same[1] and len(records) == 2 and (tmp_path / type(path).__name__ / "baseline.py").exists()


def test_words_of_a_batch_are_whole_paths(tmp_path, monkeypatch):
    path = write(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = batch.run_words({"dataset": "synthetic-tiny", "method": "mine.py", "seed": 1, "settings": {"correct": "./mine.py", "update": "mean"}})
    assert words[words.index("--method") + 1] == str(path) and f'correct="{path}"' in words and 'update="mean"' in words
    assert "baseline" in batch.run_words({"dataset": "x", "method": "baseline", "seed": 1, "settings": {"correct": "glc"}})


def test_settings_of_a_file_are_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(write(tmp_path).parent)
    assert main(["run", "--method", "mine.py", "--show-settings", "-p", "speed=3"]) == 0
    line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("speed ")]
    assert line.split()[:3] == ["speed", "3.0", "you"]
    with pytest.raises(SystemExit): main(["run", "--method", "mine.py", "--help"])
    assert "of nothing" in capsys.readouterr().out


@pytest.fixture(scope="module")
def steady(root):
    dataset, method = open_dataset("synthetic-tiny", root), runs.get_method(EXAMPLE)
    def run(out=None, stop=None, **settings):
        t = training.start(dataset, method, training.resolve(method, dataset.name, epochs=3, iterations=3, **settings), out=out)
        for _ in training.epochs(t):
            if t.epoch == stop: break
        return t
    return run


def test_the_example_weighs_images_and_survives_a_restart(steady, tmp_path):
    whole = steady()
    steady(tmp_path, stop=2)
    assert [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in steady(tmp_path).history] == [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in whole.history]
    weights = whole.method.weights
    assert weights.shape == (len(whole.images),) and 0.5 < weights.min() / weights.max() < 1 and abs(weights[whole.labels >= 0].mean() - 1) < 1e-9


def test_with_equal_weights_the_example_is_the_baseline(steady, root):
    dataset = open_dataset("synthetic-tiny", root)
    t = training.start(dataset, baseline.METHOD, training.resolve(baseline.METHOD, dataset.name, epochs=3, iterations=3))
    losses = [r["loss"] for r in training.epochs(t)]
    assert [r["loss"] for r in steady(floor=1.0).history] == pytest.approx(losses, rel=1e-6)
    shuffled = [r["loss"] for r in steady(shuffled=True).history]
    assert shuffled[0] == pytest.approx(losses[0], rel=1e-6) and abs(shuffled[1] - losses[1]) > 1e-4  # before the second epoch nothing has changed
