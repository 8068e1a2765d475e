"""Routing and dispatch of the mixture of experts."""
