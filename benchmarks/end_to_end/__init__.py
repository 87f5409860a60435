"""End to end: whole runs of the Trainer, dense and with the callback, everything counted."""
