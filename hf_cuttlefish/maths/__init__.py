"""Maths: pure functions, tensors in and tensors out.

stable_ranks   the stable rank of a tensor        convergence   have they stopped moving?
factors        the best factors of one layer      projection    an optimizer's moments, for the factors
"""

from .stable_ranks import stable_rank

__all__ = ["stable_rank"]
