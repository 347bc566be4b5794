"""Trained models at work: raw lines in, click probabilities out."""
