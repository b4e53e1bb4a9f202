"""More twins, a file for each group of families: CASES and perhaps AMENDED, as in `twins`."""
