"""The feed-forwards of each token's experts."""
