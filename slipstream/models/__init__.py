"""Networks around the tables: pure modules over dense values and pooled rows."""
