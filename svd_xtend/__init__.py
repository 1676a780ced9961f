"""Everything around the training loop. No module of this package imports a script."""
