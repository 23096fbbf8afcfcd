"""Scripts that answer questions with trained models, one for each; see experiments/README.md."""
