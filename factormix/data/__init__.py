"""Text and models: reading files, packing tokens into windows, the table of downloadable assets."""
