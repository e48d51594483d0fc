"""The version of this package, where nothing has to be imported to know it."""

__version__ = "0.2.0"
