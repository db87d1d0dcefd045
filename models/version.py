"""The version of this code, as pyproject.toml has it: shipped code knows no installed package."""

__version__ = "0.1.0"
