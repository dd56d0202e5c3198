"""Where items come from and where their results go."""
