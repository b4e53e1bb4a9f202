"""Normalisation of rows about their mean."""
