"""The version, which CMake and the build read from this file."""

__version__ = "0.1.0"
