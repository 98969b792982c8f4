"""A batch server for LLM requests on your own GPU."""

__version__ = "0.1.0"
