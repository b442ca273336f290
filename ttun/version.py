"""The version, in a file that setup.py can read without importing the rest."""

__version__ = "0.2.0"
