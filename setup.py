"""Lets tools that still ask for a setup.py build the package; everything is declared in pyproject.toml."""

from setuptools import setup

setup()
