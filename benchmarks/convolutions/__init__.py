"""Convolutional networks from random weights: dense, Cuttlefish, and the paper's and two neighbours' methods."""
