"""Load on an OpenAI endpoint over HTTP, and what its clients wait for."""
