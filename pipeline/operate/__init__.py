"""What runs need around training: `status`, `search`, `preflight` and `doctor`, a file or folder each."""
