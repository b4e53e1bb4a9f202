"""A matrix for each head."""
