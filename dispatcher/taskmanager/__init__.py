"""The worker: runs tasks against a model server and reports their results."""
