"""Gating of two tensors."""
