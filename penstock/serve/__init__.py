"""An OpenAI-compatible server. One process speaks HTTP and knows text, another runs the engine; no torch here."""
