"""Attention of a decoder over what an encoder made."""
