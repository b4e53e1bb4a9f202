"""Rows times the sigmoid of a number each."""
