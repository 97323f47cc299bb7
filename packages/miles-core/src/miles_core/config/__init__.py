"""The run configuration: sections, schema, loading, dumping."""
