"""From one attention to the next: four products, and the residual sums and norms between them."""
