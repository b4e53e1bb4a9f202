"""Gating of rows that hold gate and up side by side."""
