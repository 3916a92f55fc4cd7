"""One file per command of a stage: a dataclass of its arguments, and the function that runs it, writes its folder and says what it found."""
