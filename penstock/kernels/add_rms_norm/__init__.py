"""A residual sum and its normalisation."""
