"""One file per command of a stage: a dataclass of its arguments, and the function that runs it and says what it found."""
