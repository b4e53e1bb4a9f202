"""What requests may hold and what answers do: pydantic models, which the OpenAPI document is made of too."""
