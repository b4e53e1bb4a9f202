"""Facts about really published checkpoints, for the closed-world tests; see SOURCES.md for where each comes from."""
