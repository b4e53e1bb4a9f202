"""Expanding the step's upload."""
