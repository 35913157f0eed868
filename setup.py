"Everything about the package is said once, in settings.ini; this file only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(here / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]


def lines(key): return [o.strip() for o in cfg.get(key, "").splitlines() if o.strip()]


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["reidbook", "reidbook.*"]),
    package_data={"reidbook": ["book.mplstyle", "weights/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements"),
    extras_require={group: lines(f"{group}_requirements") for group in ("dev", "cluster", "export", "photos", "site")},
    entry_points={"console_scripts": lines("console_scripts")},
    zip_safe=False,
)
