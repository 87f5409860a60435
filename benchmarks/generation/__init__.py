"""Tokens a second of a factorized decoder, alone and as its own dense model's draft."""
