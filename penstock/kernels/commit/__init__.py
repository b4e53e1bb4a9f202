"""Writing the step's results back into the slots."""
