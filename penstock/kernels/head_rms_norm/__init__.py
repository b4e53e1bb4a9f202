"""Root-mean-square normalisation of heads."""
