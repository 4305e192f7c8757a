"""Which folder is which package."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["tca_fast", "tca_fast.*"]))
