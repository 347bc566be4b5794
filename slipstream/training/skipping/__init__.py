"""Which samples teach nothing more, and how those that stay are weighted."""
