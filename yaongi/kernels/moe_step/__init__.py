"""Routed and shared experts of a few tokens, as in generation."""
