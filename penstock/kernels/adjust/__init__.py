"""Penalties, biases and bans on logits."""
