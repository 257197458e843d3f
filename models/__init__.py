"""Networks, formulas and metrics. Nothing here knows of stages, or of files but for weights."""
