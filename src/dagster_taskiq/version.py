"""The version of this package. Knows nothing else, so that every module may import it."""

__version__ = "0.2.0.dev0"
