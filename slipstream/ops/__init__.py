"""Pure functions on arrays and frames: no files, no configuration, no logging."""
