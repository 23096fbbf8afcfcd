"""Scripts that make datasets in the project's format, one for each source; see prepare/README.md."""
