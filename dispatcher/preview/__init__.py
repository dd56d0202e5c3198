"""`dispatcher run --preview N`: a few lines, run and shown, before a run is begun."""
