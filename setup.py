"""The recipes are part of the wheel. All else is in setup.cfg: a value that is given here would hide the one there."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hf_histo*"]), "hf_histo.recipes"],
    package_dir={"hf_histo.recipes": "recipes"},
)
