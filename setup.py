"""All metadata comes from settings.ini, which nbdev reads too; only the standard library is needed to read it."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
settings = ConfigParser(delimiters="=", interpolation=None)
settings.read(here/"settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]
status = ["1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable"][int(cfg["status"]) - 1]


def required(*parts):
    "Requirements of these parts of the package, in one list."
    return [r for part in parts for r in cfg[f"{part}_requirements"].split()]


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    license_expression=cfg["license"],
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {status}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={"explore": required("explore"), "onnx": required("onnx"), "sat": required("sat"),
                    "dev": required("dev", "explore", "onnx", "sat", "site")},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
