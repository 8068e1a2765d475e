"""Mixture of experts: routing, and the squared-ReLU experts themselves."""
