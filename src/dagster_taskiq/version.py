"""The version of this package. Knows nothing else, so that anything may read it."""

__version__ = "0.2.0.dev0"
