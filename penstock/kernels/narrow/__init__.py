"""The first columns of rows."""
