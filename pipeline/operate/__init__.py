"""Commands around training, a file or folder each: `status`, `search`, `preflight` and `doctor`."""
