"""Choosing each token's experts."""
