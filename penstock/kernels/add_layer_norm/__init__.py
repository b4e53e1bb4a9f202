"""A residual sum and its normalisation about the mean."""
