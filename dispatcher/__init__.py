"""Run LLM workflows over very large JSONL files; never lose or repeat finished work."""

__version__ = "0.1.0"
