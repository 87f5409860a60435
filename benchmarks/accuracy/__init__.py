"""Accuracy at equal size: Cuttlefish, its parts and its rivals, over data sets, sizes and seeds."""
