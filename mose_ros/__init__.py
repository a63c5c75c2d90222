"""mose_ros: drive by looking and reasoning. One folder is one room; docs/architecture.md draws the house."""

__version__ = '0.1.0'
