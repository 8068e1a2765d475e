"""Casts to FP8 in both orders: activations and gradients with a given scale, weights with their own."""
