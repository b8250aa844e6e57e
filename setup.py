"""Metadata is in pyproject.toml; a compiled extension would be declared here."""

from setuptools import setup

setup()
