"""Log-probabilities of the best tokens and of the chosen one."""
