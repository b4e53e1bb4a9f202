"""Sums of two tensors."""
