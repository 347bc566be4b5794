"""Raw formats, one file per source: columns and parsing only."""
