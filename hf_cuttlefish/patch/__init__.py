"""Patch: the one place that changes a model, and the one that touches an optimizer."""
