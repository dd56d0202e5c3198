"""`dispatcher runs`: what runs there are, what became of a line, failed lines out and back in."""
