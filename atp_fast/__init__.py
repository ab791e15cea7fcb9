"""AtP*: which attention and MLP components of a language model cause a behaviour."""

from atp_fast._version import __version__

__all__ = ["__version__"]
