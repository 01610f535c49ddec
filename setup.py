"""The build is described in pyproject.toml; here is only what cannot be set there."""

import warnings

from setuptools import setup

# Every editable install warns of folders of the package's name, as a checkout has one by nature.
warnings.filterwarnings("ignore", "Editable installation")
setup()
