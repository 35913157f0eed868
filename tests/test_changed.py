"`make check` picks the tests of what changed."
from changed import ALWAYS, HERE, concerned, fitting

PAGE = {"noise": ["06_noise"], "methods.glc": ["14_methods.glc", "14a_evidence"]}
TESTS = {"test_noise.py": "from reidbook.noise import label_quality", "test_glc.py": "from reidbook.methods import glc\nfrom reidbook import noise",
         "test_data.py": "from reidbook import data"}


def test_a_page_gives_its_tests_and_a_test_itself():
    chapter = "test_book.py::test_chapter_runs[06_noise]"
    assert concerned({"nbs/06_noise.ipynb"}, PAGE, TESTS) == ["test_noise.py", chapter, "test_glc.py"]
    assert concerned({"nbs/14_methods.glc.ipynb", "tests/test_data.py"}, PAGE, TESTS)[:2] == ["test_data.py", "test_glc.py"]
    assert concerned({"nbs/14a_evidence.ipynb"}, PAGE, TESTS) == ["test_glc.py", "test_book.py::test_chapter_runs[14a_evidence]"]
    assert concerned({"README.md", "reidbook/noise.py", "nbs/results/a.json"}, PAGE, TESTS) == []


def test_what_takes_too_long_is_left_to_ci():
    assert fitting(["new.py", "other.py", "third.py"], limit=50) == (["new.py", "other.py"], ["third.py"])


def test_what_always_runs_exists():
    for test in ALWAYS:
        file, _, name = test.partition("::")
        assert f"def {name}" in (HERE / file).read_text(encoding="utf-8")
