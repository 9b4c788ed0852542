"""What was gained and lost: perplexity, agreement with the dense model, cost, speed, and the report that shows them."""
