"""Evaluations of our own that need no download: abilities that come before knowledge does, and instructions."""
