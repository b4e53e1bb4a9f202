"""A tensor clipped on both sides."""
