"""More twins, a file for each group of families: CASES, as in `twins`."""
