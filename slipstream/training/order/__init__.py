"""In which order samples become batches."""
