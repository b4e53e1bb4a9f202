"""Keys and latents into the cache."""
