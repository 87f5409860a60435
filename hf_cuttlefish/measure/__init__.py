"""Measure: what is seen of a run or a model. Changes nothing."""
