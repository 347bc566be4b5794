"""Tables as products of small tensors, so-called tensor trains."""
