"""`dispatcher export`: a run's output as Parquet or compressed."""
