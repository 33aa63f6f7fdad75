"""Starting runs and seeing how they stand: what `moe-ext launch` and `moe-ext jobs` do."""
