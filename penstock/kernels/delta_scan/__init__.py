"""Memories of keys and values that are corrected token by token, kept by slot."""
