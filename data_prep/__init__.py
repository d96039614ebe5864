"""Images to shard sets: sources, views, palette, packed WebDataset records."""
