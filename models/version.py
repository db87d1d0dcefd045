"""The version of this code, as pyproject.toml has it: code that was shipped to a worker knows no
installed package.
"""

__version__ = "0.1.0"
