"""The version of this code, as pyproject.toml has it: code that was shipped to a worker knows no installed package."""

VERSION = "0.1.0"
