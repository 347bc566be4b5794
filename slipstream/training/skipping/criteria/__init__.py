"""One file per skip criterion."""
