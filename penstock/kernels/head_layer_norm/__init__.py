"""Normalisation of heads about their mean."""
