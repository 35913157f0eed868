"A wheel built from the source distribution is whole, and works in a fresh environment, outside any checkout."
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_BUILT = shutil.ignore_patterns(".*", "__pycache__", "nbs", "data", "tests", "_proc", "_docs", "build", "dist", "*.egg-info")
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


def command(*words, cwd):
    "Run it outside the checkout: all it printed."
    p = subprocess.run(words, cwd=cwd, env=CLEAN, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout + p.stderr
    return p.stdout + p.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "`python -m build` on a copy: the source distribution, and from it the wheel. It has nothing to warn of."
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_BUILT)
    said = command(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source", cwd=folder)
    assert [line for line in said.splitlines() if "warning" in line.lower()] == []
    assert len(list((folder / "dist").iterdir())) == 2
    return next((folder / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    "A new environment with the wheel and every extra; what they require is lent by the present one, not downloaded."
    folder = tmp_path_factory.mktemp("fresh")
    command(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python, lent = folder / "venv" / "bin" / "python", folder / "lent"
    lent.mkdir()
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "reidbook" not in package.name: (lent / package.name).symlink_to(package)
    site = command(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    (Path(site) / "lent.pth").write_text(f"{lent}\n")
    command(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", f"{wheel}[{','.join(extras())}]", cwd=folder)
    return python


def settings():
    "What settings.ini says about the package."
    read = ConfigParser(interpolation=None, delimiters=["="])
    read.read(ROOT / "settings.ini")
    return read["DEFAULT"]


def extras(): return sorted(k.removesuffix("_requirements") for k in settings() if k.endswith("_requirements"))


def test_no_file_is_missing(wheel):
    with zipfile.ZipFile(wheel) as z:
        inside = {n for n in z.namelist() if n.startswith("reidbook/")}
        name = next(n for n in z.namelist() if n.endswith("METADATA"))
        about = message_from_bytes(z.read(name))
    assert inside == {p.relative_to(ROOT).as_posix() for p in ROOT.glob("reidbook/**/*") if p.is_file() and p.parent.name != "__pycache__"}
    assert sorted(about.get_all("Provides-Extra")) == extras()
    assert any(r.startswith("torch>=") for r in about.get_all("Requires-Dist")) and about["Description-Content-Type"] == "text/markdown"


def test_the_wheel_works_on_its_own(fresh, tmp_path):
    where = command(fresh, "-c", "import reidbook.training, reidbook.methods.glc; print(reidbook.__file__, reidbook.__version__)", cwd=tmp_path)
    assert where.startswith(str(fresh.parent.parent)) and where.strip().endswith(settings()["version"])
    assert "usage: reidbook" in command(fresh.with_name("reidbook"), "--help", cwd=tmp_path)
