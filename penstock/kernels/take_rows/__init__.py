"""Chosen rows of a tensor."""
