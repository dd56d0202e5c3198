"""`dispatcher slurm`: a run's batch scripts rendered, submitted, watched and stopped."""
