"""Trainer: what it knows and hands to no callback, and its steps as CUDA graphs."""
