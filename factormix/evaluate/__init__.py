"""Measure what a sparse model gains and loses: perplexity, agreement with the dense model, tasks, cost and speed."""
