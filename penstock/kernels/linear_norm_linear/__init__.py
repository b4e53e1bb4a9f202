"""Two products with a residual sum and its normalisation between them."""
