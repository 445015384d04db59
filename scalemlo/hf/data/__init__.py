"""From data sets as users have them to batches: columns, tokens, packing, sampling, streams."""
