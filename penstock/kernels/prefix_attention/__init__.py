"""Attention in which a prompt's first tokens see each other."""
