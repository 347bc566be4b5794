"""Where rows live and how they are held; `row_cache` and `duplicates` are ground that the rooms share."""
