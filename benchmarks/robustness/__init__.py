"""Robustness: runs that are killed, and files that are spoiled."""
