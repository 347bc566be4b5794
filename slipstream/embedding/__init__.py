"""Where rows live, how they are represented, and which of them still change."""
