"""A short causal convolution over each channel, whose last inputs are kept by slot."""
