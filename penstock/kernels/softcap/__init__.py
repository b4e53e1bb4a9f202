"""A tensor capped softly."""
