"""The version, read by the build, the extension and the package."""

__version__ = "0.1.0"
