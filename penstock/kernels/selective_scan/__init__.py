"""State spaces that are written and read token by token, kept by slot."""
