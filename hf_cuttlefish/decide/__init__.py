"""Decide: when, where and how much. A plan comes out."""
