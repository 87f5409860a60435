"""Benchmarks: accuracy, speed, compatibility and robustness. None of them is in the wheel."""
