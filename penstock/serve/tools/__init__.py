"""Tool calls: what a request may say of them, how a model writes them, and how its text becomes calls again."""
