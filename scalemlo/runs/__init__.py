"""What a run from a file needs: configuration, schema, provenance, assets, the launcher's words."""
