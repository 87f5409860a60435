"""Every model class of transformers' auto mappings, tiny, through all that we do to a model."""

import os

# Before transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
