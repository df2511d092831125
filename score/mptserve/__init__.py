"""Serve the MPT language models: request in, generated text out."""

__version__ = "0.1.0"
