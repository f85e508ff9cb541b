"""The recipes and their configs are part of the wheel: what else there is to say stands in setup.cfg."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hf_histo*"]), "hf_histo.recipes"],
    package_dir={"hf_histo.recipes": "recipes"},
    package_data={"hf_histo.recipes": ["configs/*.yaml", "configs/*/*.yaml"]},
)
