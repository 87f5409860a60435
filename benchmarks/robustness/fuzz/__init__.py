"""Hostile files: mutations of everything that the package reads, each in a process that is watched."""

import os

# Before transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
