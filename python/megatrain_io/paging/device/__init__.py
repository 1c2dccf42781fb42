"""Devices that compute, and how records, gradients and activations get to them and back."""
