"""A tensor in float32."""
