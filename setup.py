"""The recipes are part of the wheel. Everything else is in setup.cfg, whose values one that is given here would hide."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hf_histo*"]), "hf_histo.recipes"],
    package_dir={"hf_histo.recipes": "recipes"},
)
