"""The squared-ReLU experts with products in FP8."""
