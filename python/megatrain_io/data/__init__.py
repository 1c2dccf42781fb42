"""Training data: from files of many formats to packed rows of tokens and micro-batches."""
