"""One verb, one module: the same word in the command line, the pipeline file and the output folder."""
