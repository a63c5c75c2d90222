"""Offline: collect, annotate, the training stages, export."""
