"""What is not a training loop. Nothing in here imports a script."""
