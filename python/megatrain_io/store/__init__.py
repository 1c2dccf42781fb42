"""Stores: parameter space, schedule, pool, and records as tensors for as long as they are borrowed."""
