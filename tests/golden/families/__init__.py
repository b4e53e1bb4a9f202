"""Two tiny layers of more families, a file for each group: FAMILIES, as in `tests.golden.specs`."""
