"""Attention of an encoder over whole inputs."""
