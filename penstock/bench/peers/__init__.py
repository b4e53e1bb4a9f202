"""Other ways to run the same shapes on the same machine. Each module here is run as a process of its own."""
