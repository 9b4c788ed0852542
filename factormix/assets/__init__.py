"""Models and texts that come from packages: their table, how they are fetched, and what converts them."""
