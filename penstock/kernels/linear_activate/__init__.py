"""Products with an activation behind them: the kernels of `linear`."""
