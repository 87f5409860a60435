"""Speed: training step, rank check, switch, memory and inference, dense and factorized in turn in one run."""
