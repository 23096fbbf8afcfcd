"""Scripts that make datasets in the project's format, one a source; see prepare/README.md."""
