"""Layers: the dense ones that can be factorized, the low-rank one, and the parts of their tensors."""
