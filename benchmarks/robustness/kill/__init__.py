"""Kill anywhere: real runs are killed, resumed, and must end on the bits of a run left alone."""

import os

# Before torch and transformers are imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
