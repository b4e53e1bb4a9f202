"""Columns in consecutive groups."""
