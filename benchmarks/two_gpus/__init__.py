"""Two GPUs of one machine: the example scripts as they are shipped, and what a second GPU gains."""
