"""A tensor times a constant."""
