"""What is on disk: the journal, the ordered output, the input lines."""
