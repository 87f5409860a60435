"""Save: folders that load, and checkpoints that resume."""
