"""The kinds of input, and how one that is no plain file becomes one: a copy, one line a row."""
