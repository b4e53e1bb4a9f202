"""Rotation by two places, within a prefix and behind it."""
