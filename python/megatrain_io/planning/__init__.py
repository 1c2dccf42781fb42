"""What a run needs, takes and costs, known before it begins."""
