"""Mixtures of experts: what pairs cost in perplexity, and how fast a step with grouped products is."""
