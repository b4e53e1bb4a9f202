"""Attention that rotates and appends the step's own keys itself."""
