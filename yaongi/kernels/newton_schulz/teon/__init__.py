"""The Teon update: momentum before the Newton-Schulz steps, weights after them."""
