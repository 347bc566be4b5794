"""Who does the work of the stages before training: threads of this process, or workers on other machines."""
